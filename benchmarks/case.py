"""What is measured: the sizes and options of one call of attention, its random inputs, and how many operations it counts as."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attention.call import Call, Settings
from flash_attention.reference import Visible
from flash_attention.reference.tiles import broadcast_mask
from flash_attention.scores import alibi_slopes
from flash_attention.spans import documents

DTYPES = ("float32", "float16", "bfloat16", "float64")
MASKS = ("none", "key", "full")
BIASES = {"none": "", "full": "bhqk", "batches share": "hqk", "heads share": "bqk", "keys": "hk"}  # not broadcast along these


@dataclass(frozen=True)
class Case:
    """Queries (b, h, q_len, d) against keys and values (b, h, kv_len, d). Plain values only, so that a case can be written as JSON."""

    b: int = 1
    h: int = 2
    q_len: int = 4096
    kv_len: int = 4096
    d: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = False
    mask: str = "none"
    dropout_p: float = 0.0
    backward: bool = False
    dv: int | None = None  # the head size of v, if it is another
    window: int | None = None  # how many columns before its own each row sees
    documents: tuple[int, ...] = ()  # lengths of documents packed one after another, each of which sees itself
    as_mask: bool = False  # the window and the documents are passed as an equivalent dense mask
    softcap: float | None = None
    alibi: bool = False
    bias: str = "none"  # one of BIASES
    bias_gradient: bool = False

    @property
    def mask_kind(self) -> str:
        """How rows are restricted, in one word: none, key, full, causal, causal-key or causal-full."""
        return self.mask if not self.causal else "causal" if self.mask == "none" else f"causal-{self.mask}"

    def shortened(self, length: int) -> "Case":
        """The same case with one batch, at most `length` queries and keys, and no documents: for warming up."""
        return replace(self, b=1, q_len=min(self.q_len, length), kv_len=min(self.kv_len, length), documents=())

    def beyond_official_kernels(self) -> str | None:
        """Why FlashAttention-3 and -4 are not measured on this case, or None."""
        if max(self.d, self.dv or 0) > 256:
            return "it takes head sizes up to 256"
        if self.mask != "none" or self.as_mask or self.dropout_p or self.scored():
            return "it takes no mask and no dropout, and changed scores are not measured with it"
        return None

    def scored(self) -> list[str]:
        """What happens to scores, in words."""
        words = [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        words += ["ALiBi"] if self.alibi else []
        if self.bias != "none":
            words += [f"bias {self.bias}" + (" with gradient" if self.bias_gradient else "")]
        return words

    def describe(self, lengths: bool = True) -> str:
        options = ["forward + backward" if self.backward else "forward", *(["causal"] if self.causal else []), f"mask {self.mask}"]
        options += [f"dropout {self.dropout_p:g}"] if self.dropout_p else []
        options += [f"window {self.window}"] if self.window is not None else []
        options += [f"documents {list(self.documents)}"] if self.documents else []
        options += self.scored()
        sizes = f"q_len {self.q_len}, kv_len {self.kv_len}, " if lengths else ""
        head = f"d {self.d}" + (f" dv {self.dv}" if self.dv else "")
        return f"{', '.join(options)}; b {self.b}, h {self.h}, {sizes}{head}, {self.dtype}"


class Inputs(NamedTuple):
    q: Tensor  # (b, h, q_len, d)
    k: Tensor  # (b, h, kv_len, d)
    v: Tensor  # (b, h, kv_len, dv)
    dO: Tensor | None  # (b, h, q_len, dv), the gradient that a backward starts from
    mask: Tensor | None  # (b, kv_len) or (b, h or 1, q_len, kv_len), True = may attend
    spans: Tensor | None = None  # (1, 1, q_len, 2)
    bias: Tensor | None = None  # (b or 1, h or 1, q_len or 1, kv_len), in q's dtype
    alibi: Tensor | None = None  # (h,)


def random_inputs(case: Case, seed: int = 0) -> Inputs:
    """Standard normal q, k, v and dO; a mask that allows half of the keys, drawn anew for each batch entry ("key") or row ("full").

    The first key is always allowed, so that no row is left with nothing to attend.
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    dv = case.dv or case.d

    def normal(length: int, d: int) -> Tensor:
        # Packed documents lie in memory as layers leave them: (B, N, H, D).
        shape = (case.b, length, case.h, d) if case.documents else (case.b, case.h, length, d)
        x = torch.randn(shape, generator=generator, dtype=getattr(torch, case.dtype), device=case.device)
        return x.transpose(1, 2) if case.documents else x

    sizes = (case.q_len, case.d), (case.kv_len, case.d), (case.kv_len, dv)
    q, k, v = (normal(*size).requires_grad_(case.backward) for size in sizes)
    dO = normal(case.q_len, dv) if case.backward else None
    mask = None
    if case.mask != "none":
        shape = (case.b, case.kv_len) if case.mask == "key" else (case.b, case.h, case.q_len, case.kv_len)
        mask = torch.empty(shape, dtype=torch.bool, device=case.device).bernoulli_(0.5, generator=generator)
        mask[..., 0] = True
    spans = documents(case.documents, causal=case.causal).to(case.device) if case.documents else None
    if case.as_mask:
        if mask is not None:
            raise ValueError(f"a window or documents as a mask beside another mask: {case.describe()}")
        mask, spans = _visible(case, spans).dense(slice(0, case.q_len), slice(0, case.kv_len), case.device), None
    bias = alibi = None
    if case.bias != "none":
        sizes = {"b": case.b, "h": case.h, "q": case.q_len, "k": case.kv_len}
        shape = [n if name in BIASES[case.bias] else 1 for name, n in sizes.items()]
        bias = torch.randn(shape, generator=generator, dtype=q.dtype, device=case.device).requires_grad_(
            case.backward and case.bias_gradient
        )
    if case.alibi:
        alibi = alibi_slopes(case.h, case.device)
    return Inputs(q, k, v, dO, mask, spans, bias, alibi)


def _visible(case: Case, spans: Tensor | None) -> Visible:
    return Visible(case.q_len, case.kv_len, case.window, 0 if case.causal else None, spans)


def visible_rows(case: Case, inputs: Inputs, rows: slice) -> Tensor | None:
    """(1, 1, rows, kv_len) bool: what these rows see, ignoring the mask; None if that is everything."""
    if inputs.spans is None and case.window is None and not case.causal:
        return None
    return _visible(case, inputs.spans).dense(rows, slice(0, case.kv_len), case.device)


def call_of(case: Case, inputs: Inputs) -> Call:
    """The case as a Call, to ask a backend about."""
    mask = broadcast_mask(inputs.mask, case.b, case.h, case.q_len, case.kv_len)
    spans = None if inputs.spans is None else inputs.spans.expand(case.b, case.h, case.q_len, 2)
    left, right = (None, None) if case.as_mask else (case.window, 0 if case.causal else None)
    alibi = None if inputs.alibi is None else inputs.alibi.expand(case.b, case.h)
    settings = Settings(1.0, case.dropout_p, left, right, softcap=case.softcap)
    return Call.of(*inputs[:3], mask, spans, settings, bias=inputs.bias, alibi=alibi)


def tera_operations(case: Case, part: str) -> float:
    """Floating-point operations /1e12 of "forward", "backward" or both ("total"), as the field counts them: matrix products of
    2·b·h·q_len·kv_len·d each, two in a forward and five in a backward, halved if causal, whatever the mask; what a backward recomputes is
    not counted. With a window or documents, q_len·kv_len is replaced by the number of visible pairs."""
    product, dv = 2 * case.b * case.h * _pairs(case), case.dv or case.d
    forward, backward = product * (case.d + dv), product * (3 * case.d + 2 * dv)
    return {"forward": forward, "backward": backward, "total": forward + backward}[part if case.backward else "forward"] / 1e12


def _pairs(case: Case) -> float:
    """The number of pairs of a query and a key that it sees."""
    if case.window is None and not case.documents:
        return case.q_len * case.kv_len / (2 if case.causal else 1)
    visible = _visible(case, documents(case.documents, causal=case.causal) if case.documents else None)
    start, stop = map(torch.tensor, zip(*map(visible.interval, range(case.q_len)), strict=True))
    if visible.spans is not None:
        first, last = visible.spans[0, 0].unbind(-1)
        start, stop = torch.maximum(start, first), torch.minimum(stop, last)
    return int((stop - start).clamp(min=0).sum())
