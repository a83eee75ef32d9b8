"""Who is measured: normal attention, flash attention (one contender for each backend), PyTorch's scaled_dot_product_attention (on CUDA
one for each of its kernels), its FlexAttention under a dense mask, a window or documents, and FlashAttention-3 and -4 where they are
installed, all made callable in the same way."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import flash_attention_3, flash_attention_4
from benchmarks.case import Case, Inputs, call_of, visible_rows
from flash_attention import flash_attention
from flash_attention.backends import BACKENDS, choose, emulated, no_gradients
from flash_attention.reference import Visible, normal_attention, normal_attention_causal

TYPES = ("normal", "flash", "sdpa")
OFFICIAL = {"fa3": flash_attention_3, "fa4": flash_attention_4}  # the authors' own packages, where they are installed
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Contender(NamedTuple):
    type: str  # one of TYPES, "flex", "fa3", "fa4", or "plain": flash without what the case does to scores
    backend: str = ""  # of flash: a name in BACKENDS; of sdpa: one in SDPA_KERNELS, or "" for the one PyTorch picks

    def __str__(self) -> str:
        return f"{self.type} ({self.backend})" if self.backend else self.type


class Runner:
    """A contender with its inputs. Calling it runs every stage: the forward, then the backward if the case has one.

    Code that calls the stages one by one must do so within `context()`.
    """

    def __init__(self, contender: Contender, case: Case, inputs: Inputs):
        self.contender, self.case, self.inputs = contender, case, inputs
        kinds = {"normal": _normal, "flash": _flash, "plain": _plain, "sdpa": _sdpa, "flex": _flex, "fa3": _fa3, "fa4": _fa4}
        attend = kinds[contender.type](contender.backend, case, inputs)
        q, k, v, dO = inputs[:4]
        trained = (inputs.bias,) if case.bias_gradient and contender.type != "plain" else ()
        self.stages: dict[str, Callable[[Any], Any]] = {"forward": lambda _: attend(q, k, v)}
        if case.backward:
            # Nothing is accumulated into .grad, so a call leaves nothing behind that the next one would have to add to.
            self.stages["backward"] = lambda O: torch.autograd.grad(O, (q, k, v, *trained), dO)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Records gradients only if the case has a backward, and selects PyTorch's kernel."""
        type, backend = self.contender
        chosen = sdpa_kernel(SDPA_KERNELS[backend]) if type == "sdpa" and backend else nullcontext()
        with torch.set_grad_enabled(self.case.backward), chosen:
            yield

    def __call__(self) -> Any:
        result = None
        with self.context():
            for stage in self.stages.values():
                result = stage(result)
        return result


def contenders(type: str, backend: str | None, case: Case, inputs: Inputs) -> list[Contender]:
    """The contenders for a `type` (one of TYPES, or "all") and a `backend` (None: the fastest; with "all": each that can serve).

    Raises:
        NotImplementedError: the backend asked for cannot serve this case; the message says why.
    """
    call = call_of(case, inputs)
    if type == "normal":
        return [Contender("normal")]
    if type == "flash":
        return [Contender("flash", choose(backend, call))]
    if type == "sdpa":
        return [Contender("sdpa")]
    here = {name: each for name, each in BACKENDS.items() if name not in emulated.RUNGS}  # the emulator's time means nothing
    flash = [name for name, each in here.items() if each.why_not(call) is None] if backend is None else [choose(backend, call)]
    sdpa = ["", *SDPA_KERNELS] if inputs.q.is_cuda else [""]
    return [Contender("normal"), *(Contender("flash", name) for name in flash), *(Contender("sdpa", name) for name in sdpa)]


def why_not(contender: Contender, case: Case) -> str | None:
    """Why this contender should not be run here, or None."""
    if contender.type == "flex" and torch.device(case.device).type != "cuda":
        return "on a CPU it has no backward"
    if contender.type in OFFICIAL:
        return OFFICIAL[contender.type].why_not(case)
    if contender.type == "flash" and case.backward and (reason := no_gradients(BACKENDS.get(contender.backend))):
        return reason
    if contender.type != "normal":
        return None
    # Scores and probabilities, and copies of them while masking; with a backward the gradients of both.
    matrices = (5 if case.backward else 3) + (1 if case.dropout_p else 0)
    needed = matrices * case.b * case.h * case.q_len * case.kv_len * getattr(torch, case.dtype).itemsize
    free = _free_memory(case.device)
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free" if free is not None and needed > free else None


def refusal(runner: Runner) -> str | None:
    """Tries one call. → None if it ran, else why not: not enough memory, or PyTorch has no such kernel for these inputs.

    On a CPU, where a call can take long, only a kernel asked for by name is tried.
    """
    type, backend = runner.contender
    if not runner.inputs.q.is_cuda and not (type == "sdpa" and backend):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns, once for each kernel, why it does not take it
            runner()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except RuntimeError as error:
        if type not in ("sdpa", "flex", *OFFICIAL):
            raise
        return " ".join(str(error).splitlines()[:2])  # the second line of a compiler's message is the informative one
    return None


def _free_memory(device: str) -> int | None:
    """Bytes; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# ---- the types: (backend, case, inputs) → a function of (q, k, v) that returns O


class CoinFlips:
    """PyTorch's random bits instead of `flash_attention.reference.Dropout`, whose Philox is written for reading: with that, normal
    attention would look slower than it is. Kept entries are not scaled here; V, which is smaller, is scaled instead."""

    def __init__(self, case: Case):
        self.keep, self.heads, self.device = 1 - case.dropout_p, (case.b, case.h), case.device

    def tile(self, i: slice, j: slice, dtype: torch.dtype) -> Tensor:
        shape = (*self.heads, i.stop - i.start, j.stop - j.start)
        return torch.empty(shape, dtype=torch.bool, device=self.device).bernoulli_(self.keep)


def _normal(backend: str, case: Case, inputs: Inputs) -> Callable:
    if case.window is not None or case.documents:
        mask = inputs.mask if case.as_mask else visible_rows(case, inputs, slice(0, case.q_len))
        attention = normal_attention
    else:
        mask, attention = inputs.mask, normal_attention_causal if case.causal else normal_attention
    if scored := _scored(case, inputs):
        scored["visible"] = Visible(case.q_len, case.kv_len, right=0 if case.causal else None)
        return lambda q, k, v: normal_attention(q, k, v, mask, **scored)
    if not case.dropout_p:
        return lambda q, k, v: attention(q, k, v, mask)
    return lambda q, k, v: attention(q, k, v / (1 - case.dropout_p), mask, dropout=CoinFlips(case))


def _scored(case: Case, inputs: Inputs) -> dict:
    """The case's softcap, bias and alibi, those that it has."""
    given = {"softcap": case.softcap, "bias": inputs.bias, "alibi": inputs.alibi}
    return {name: x for name, x in given.items() if x is not None}


def _plain(backend: str, case: Case, inputs: Inputs) -> Callable:
    return _flash(backend or None, case, inputs._replace(bias=None, alibi=None), softcap=None)


def _flash(backend: str, case: Case, inputs: Inputs, **others) -> Callable:
    options = {
        "dropout_p": case.dropout_p,
        "backend": backend,
        "bias": inputs.bias,
        "alibi": inputs.alibi,
        "softcap": case.softcap,
    } | others
    if not case.as_mask:
        window = None if case.window is None else (case.window, None)
        options |= {"causal": case.causal, "window": window, "spans": inputs.spans}
    return lambda q, k, v: flash_attention(q, k, v, inputs.mask, **options)


def _sdpa(backend: str, case: Case, inputs: Inputs) -> Callable:
    if case.softcap is not None or case.alibi or (case.bias != "none" and (case.causal or case.mask != "none")):
        raise NotImplementedError(f"sdpa is compared under a bias alone, not in the case: {case.describe()}")
    if inputs.bias is not None:
        bias = inputs.bias.expand(case.b, case.h, case.q_len, case.kv_len)
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mask = inputs.mask[:, None, None, :] if case.mask == "key" else inputs.mask
    # is_causal is aligned top-left and excludes a mask: in all other cases PyTorch gets the whole matrix as a mask, made here, before the
    # clock starts.
    is_causal = case.causal and mask is None and case.q_len == case.kv_len and case.window is None and not case.documents
    seen = None if is_causal or case.as_mask else visible_rows(case, inputs, slice(0, case.q_len))
    if seen is not None:
        mask = seen if mask is None else seen & mask
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=case.dropout_p, is_causal=is_causal)


def _flex(backend: str, case: Case, inputs: Inputs) -> Callable:
    """FlexAttention under a mask, (b, h or 1, q_len, kv_len) or of keys (b, kv_len), which it reads entry by entry, or with a window or
    documents, which it computes. Its map of empty blocks is made here, before the clock starts."""
    if scored := _scored(case, inputs):
        return _flex_scored(case, **scored)
    computed = case.window is not None or bool(case.documents)
    if case.dropout_p or (case.causal and not computed) or (inputs.mask is None and not computed):
        raise NotImplementedError(f"flex is compared under a mask, a window or documents alone, not in the case: {case.describe()}")
    if computed:
        if case.mask != "none":
            raise NotImplementedError(f"flex is compared with a window or documents alone, not in the case: {case.describe()}")
        allowed, batches, heads = _allowed(case), 1, 1
    else:
        mask = inputs.mask[:, None, None, :] if case.mask == "key" else inputs.mask
        batches, heads, rows, _ = mask.shape

        def allowed(b, h, i, j):
            return mask[b, h if heads > 1 else 0, i if rows > 1 else 0, j]

    blocks = create_block_mask(allowed, batches, heads, case.q_len, case.kv_len, device=case.device)
    # Compiled for this shape only; an error if it cannot be compiled.
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: attend(q, k, v, block_mask=blocks)


def _flex_scored(case: Case, softcap: float | None = None, bias: Tensor | None = None, alibi: Tensor | None = None) -> Callable:
    """FlexAttention with these as its score function, compiled for it alone."""

    def score(s, b, h, i, j):
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, i if bias.shape[2] > 1 else 0, j]
        return s if alibi is None else s - alibi[h] * (i - j).abs()

    if case.mask != "none" or case.window is not None or case.documents or case.dropout_p:
        raise NotImplementedError(f"flex is compared with scores alone, not in the case: {case.describe()}")
    blocks = None
    if case.causal:
        blocks = create_block_mask(lambda b, h, i, j: j <= i, 1, 1, case.q_len, case.kv_len, device=case.device)
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: attend(q, k, v, score_mod=score, block_mask=blocks)


def _allowed(case: Case) -> Callable:
    """The case's window or documents as FlexAttention takes them: a function of a row and a column, equally many of both."""
    lengths = torch.tensor(case.documents or (case.q_len,))
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(case.device)
    window = case.q_len if case.window is None else case.window

    def of_window(b, h, i, j):
        return (j >= i - window) & (j <= i) if case.causal else j >= i - window

    def of_documents(b, h, i, j):
        return (document[i] == document[j]) & of_window(b, h, i, j)

    return of_documents if case.documents else of_window


def _fa3(backend: str, case: Case, inputs: Inputs) -> Callable:
    return lambda q, k, v: flash_attention_3.attend(q, k, v, case.causal, case.window, case.documents)


def _fa4(backend: str, case: Case, inputs: Inputs) -> Callable:
    return lambda q, k, v: flash_attention_4.attend(q, k, v, case.causal, case.window)
