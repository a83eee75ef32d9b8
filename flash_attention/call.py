"""One call of attention, as interface.py makes it and hands it down.

`Settings` holds everything but tensors: a new setting is a field here, is checked in interface.py, and is used where it has a meaning. The
layers between pass the whole object on. The ops (torch.library) take its fields one by one, by the schema that is made from them.
"""

import types
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from flash_attention.reference.score import Score
from flash_attention.reference.visible import Visible


class Settings(NamedTuple):
    """The settings of a call: everything but its tensors."""

    scale: float  # of the scores
    dropout_p: float = 0.0
    left: int | None = None  # how many columns before its own a row sees, None for all: `Visible`
    right: int | None = None  # and after it; 0 is causal
    backend: str = ""  # as `flash_attention.backends.as_chosen` writes it
    block_size: int | None = None  # of the reference's tiles
    # If these rows and columns are parts of a longer sequence: the positions of the first ones in it, and its Nk − Nq (None: these are
    # all). Everything that depends on positions, including dropout's bits and the columns in spans, then counts from the start of that
    # sequence.
    q_offset: int = 0
    k_offset: int = 0
    diagonal: int | None = None
    softcap: float | None = None  # of the scores
    # float32: whether TF32's accuracy will do (`allows_tf32` when the forward is called). It is kept because a backward must compute the
    # forward's scores again. Backends may compute more accurately.
    tf32: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether these rows and columns are the whole sequence: positions count from the first of them."""
        return self.q_offset == self.k_offset == 0 and self.diagonal is None

    def visible(self, Nq: int, Nk: int, spans: Tensor | None) -> Visible:
        """Which of these columns each of these rows sees."""
        if spans is not None and self.k_offset:
            spans = spans - self.k_offset
        diagonal = self.diagonal_of(Nq, Nk)
        return Visible(Nq, Nk, self.left, self.right, spans, diagonal)

    def score(self, Nq: int, Nk: int, bias: Tensor | None, alibi: Tensor | None) -> Score | None:
        """What happens to a score before the softmax; None if nothing does."""
        return Score.of(self.softcap, bias, alibi, self.diagonal_of(Nq, Nk))

    def diagonal_of(self, Nq: int, Nk: int) -> int:
        """The column, counted from the first of these, at which the first of these rows stands."""
        return (Nk - Nq if self.diagonal is None else self.diagonal) + self.q_offset - self.k_offset


def allows_tf32() -> bool:
    """Whether PyTorch's own float32 products on CUDA may be TF32's: after `torch.set_float32_matmul_precision("high")` or `"medium"`, or
    what else sets torch.backends.cuda.matmul.allow_tf32."""
    try:
        return torch._C._get_cublas_allow_tf32()
    except RuntimeError:  # the older and the newer names of the setting were both used, and disagree
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, but that imports the compiler. torch.compile traces a function again when the setting
# changes.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _schema_type(hint) -> str:
    """A type as the ops' schemas write it: int | None is int?."""
    kinds = get_args(hint) or (hint,)
    return kinds[0].__name__ + "?" * (types.NoneType in kinds)


SCHEMA = ", ".join(f"{_schema_type(hint)} {name}" for name, hint in get_type_hints(Settings).items())


class Form(NamedTuple):
    """A tensor without its contents."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor | None) -> "Form | None":
        return None if x is None else cls(x.shape, x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """A tensor of this form that takes no memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def contiguous(self) -> "Form":
        """The form of a contiguous copy."""
        _, H, N, D = self.shape
        return self._replace(stride=(H * N * D, N * D, D, 1))


class Call(NamedTuple):
    """Everything that determines how a call is computed: shapes, strides, dtypes and settings."""

    q: Form  # (B, H, Nq, D)
    k: Form  # (B, Hkv, Nk, D)
    v: Form  # (B, Hkv, Nk, Dv)
    mask: Form | None  # (B, H, Nq, Nk), a view
    spans: Form | None  # (B, H, Nq, 2), a view
    settings: Settings
    O: Form | None = None  # a backward's
    dO: Form | None = None
    mask_is_aligned: bool = False  # begins at a multiple of 16 bytes
    bias: Form | None = None  # (B or 1, H or 1, Nq or 1, Nk or 1)
    alibi: Form | None = None  # (B or 1, H)
    to_bias: bool = False  # a backward's: whether it computes the bias' gradient

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        spans: Tensor | None,
        settings: Settings,
        O: Tensor | None = None,
        dO: Tensor | None = None,
        bias: Tensor | None = None,
        alibi: Tensor | None = None,
        to_bias: bool = False,
    ) -> "Call":
        """The call of these tensors."""
        has_address = mask is not None and not torch._C._functorch.is_functorch_wrapped_tensor(mask)
        is_aligned = has_address and mask.data_ptr() % 16 == 0
        of = Form.of
        return cls(of(q), of(k), of(v), of(mask), of(spans), settings, of(O), of(dO), is_aligned, of(bias), of(alibi), to_bias)

    @property
    def has_dropout(self) -> bool:
        return self.settings.dropout_p > 0

    @property
    def score(self) -> tuple[str, ...]:
        """The arguments that change scores before the softmax, by name."""
        given = {"softcap": self.settings.softcap, "bias": self.bias, "alibi": self.alibi}  # named as attention.h's SCORE_ bits
        return tuple(name for name, x in given.items() if x is not None)

    @property
    def has_float8_keys(self) -> bool:
        """Whether K and V are e4m3, with a scale for each of their heads."""
        return self.k.dtype == torch.float8_e4m3fn

    @property
    def head_dim(self) -> int:
        """The larger of D and Dv."""
        return max(self.q.shape[3], self.v.shape[3])

    @property
    def visible(self) -> str:
        """Which columns a row sees, as kernels are compiled for it: "all", "causal", or an "interval" of its own."""
        settings = self.settings
        if self.spans is not None or settings.left is not None or settings.right not in (None, 0) or not settings.is_whole:
            return "interval"
        return "all" if settings.right is None else "causal"
