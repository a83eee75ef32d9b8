"""`flash_attention()` as an attention implementation of Hugging Face transformers.

    from flash_attention.integrations.hugging_face import register

    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation=register())
    model.set_attn_implementation(register())  # a model that is there already

For models that look their attention up in transformers' `AttentionInterface`, as nearly all do since version 5. The file is not called
transformers.py, which would hide the library from a script in this folder.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from flash_attention.backends import cuda
from flash_attention.interface import flash_attention
from flash_attention.reference import Visible
from flash_attention.scores import with_sinks

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "flash_attention.integrations.hugging_face needs Hugging Face transformers 5 or newer, which the extra `transformers` installs: "
        "pip install 'flash_attention[transformers]', in a clone pip install -e '.[transformers]'"
    ) from error

# Keywords that models pass and that have no effect here: `sliding_window` is in the mask, the others are meant for other layers. Any other
# keyword that is set is refused, known or not.
HARMLESS = frozenset(
    ["sliding_window", "max_length_q", "max_length_k", "deterministic", "position_ids", "use_cache", "num_items_in_batch", "grid_thw",
     "input_ids", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"]
)  # fmt: skip
DOCUMENTS = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))  # several documents in one row: harmless if a mask separates them

# Model types that only `eager` computes correctly, and why.
EAGER_ONLY = {
    "git": "its text layers add the mask to scores of their own",
    "bigbird_pegasus": "its encoder adds the mask to scores of its own",
    "deepseek_v4": "its layers append numbers that are added to scores to a mask of True and False, where 0 would hide",
    "bridgetower": "its layers declare themselves causal where, without a mask, they are not",
}

logger = logging.get_logger(__name__)


def register(name: str = "tiled_attention") -> str:
    """Make `attn_implementation=name` mean `flash_attention()`, for every model of this process; returns the name.

    Raises:
        ValueError: the name contains "flash", which transformers takes for an external package and then prepares no masks.
    """
    if "flash" in name:
        raise ValueError(f'the name must not contain "flash", which transformers treats in its own way, got {name!r}')
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others,
) -> Tensor:
    """The mask that transformers' `sdpa_mask` makes: bool (B, 1, Nq, Nk), True = may attend. Causality, sliding windows, padding and packed
    documents become an `ImpliedMask`, which takes no memory of that size; other patterns are materialised by `sdpa_mask`.

    `sdpa_mask` returns None for some masks. None does not say whether the mask is causal or absent, how it is aligned, or for how many
    queries it is: a model that drops the first queries, as Gemma 4 does in layers that share keys and values, must not change what the
    others see.

    Raises:
        NotImplementedError: the model type is in EAGER_ONLY.
    """
    kind = getattr(others.get("config"), "model_type", None)
    if kind in EAGER_ONLY:
        raise NotImplementedError(f'{kind} needs attn_implementation="eager": {EAGER_ONLY[kind]}')
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    pattern = None
    if not torch.compiler.is_compiling() and not isinstance(q_offset, Tensor):
        pattern = Pattern.of(mask_function)
    if pattern is None:
        options = {"mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size}
        made = sdpa_mask(batch_size, q_length, kv_length, **offsets, **options, allow_is_causal_skip=allow_is_causal_skip, **others)
        if made is not None or torch.compiler.is_compiling():
            return made
        pattern, attention_mask = Pattern(right=0 if allow_is_causal_skip and q_length > 1 else None), None
        q_offset = kv_offset = 0
    keys = None
    if attention_mask is not None:
        keys = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length].bool()
        keys = None if keys.all() else keys
    pattern = pattern._replace(diagonal=q_offset - kv_offset, keys=keys)
    return ImpliedMask((batch_size, 1, q_length, kv_length), pattern, others.get("device", "cpu"))


class Pattern(NamedTuple):
    """What each row sees, in the terms of `Visible`, and which keys are not padding."""

    left: int | None = None
    right: int | None = None
    diagonal: int = 0  # row i stands at column i + diagonal
    document: Tensor | None = None  # (B, N): the number of each row's, which never decreases
    keys: Tensor | None = None  # (B, Nk) bool, True = may be attended

    @classmethod
    def of(cls, function) -> "Pattern | None":
        """The pattern of a mask function of transformers.masking_utils, or None if the function is unknown here."""
        if getattr(function, "__module__", None) != masking_utils.__name__ or not inspect.isfunction(function):
            return None
        inside = inspect.getclosurevars(function).nonlocals
        match function.__qualname__.removesuffix(".<locals>.inner_mask"):
            case "causal_mask_function":
                return cls(right=0)
            case "bidirectional_mask_function":
                return cls()
            case "sliding_window_overlay":
                return cls(left=inside["sliding_window"] - 1)
            case "sliding_window_bidirectional_overlay":
                return cls(left=inside["sliding_window"], right=inside["sliding_window"])
            case "packed_sequence_mask_function":
                return cls(document=inside["packed_sequence_mask"])
            case "remap_positions_for_packed_sequence":  # positions inside each document, of which the others see distances alone
                return cls.of(inside["mask_function"])
            case "and_masks.<locals>.and_mask":
                parts = [cls.of(part) for part in inside["mask_functions"]]
                if None in parts:
                    return None
                left, right = map(_tighter, *(part[:2] for part in parts))
                return cls(left, right, document=_only(parts))
        return None

    @property
    def hides_nothing(self) -> bool:
        return self.left is self.right is self.document is self.keys is None

    @property
    def spans(self) -> Tensor | None:
        """(B, 1, N, 2), of the documents."""
        if self.document is None:
            return None
        ends = [torch.searchsorted(self.document, self.document, right=right) for right in (False, True)]
        return torch.stack(ends, -1).int()[:, None]

    def dense(self, Nq: int, Nk: int, device: torch.device) -> Tensor:
        """The mask materialised, (B or 1, 1, Nq, Nk)."""
        visible = Visible(Nq, Nk, self.left, self.right, self.spans, self.diagonal)
        seen = visible.dense(slice(0, Nq), slice(0, Nk), device)
        return seen if self.keys is None else seen & self.keys[:, None, None]

    def options(self, Nq: int, Nk: int) -> tuple[slice | None, dict[str, Any]] | None:
        """The keys to attend (None: all), and `flash_attention()`'s options for them, aligned to the last one; None if options cannot
        express the pattern."""
        left, right, diagonal = self.left, self.right, self.diagonal
        stop = Nk if right is None else min(Nk, Nq + diagonal + right)
        start = 0
        if Nq == 1:  # then only the first and the last key are limited
            start, left, right = 0 if left is None else max(0, diagonal - left), None, None
        if ((left, right) != (None, None) and stop - Nq != diagonal) or not 0 <= start < stop:
            return None
        options = {"causal": right == 0, "window": None if left is None and right in (None, 0) else (left, right), "spans": self.spans}
        attended = None if (start, stop) == (0, Nk) else slice(start, stop)
        return attended, options | {"mask": None if self.keys is None else self.keys[:, start:stop]}


def _tighter(*limits: int | None) -> int | None:
    return min((x for x in limits if x is not None), default=None)


def _only(parts: list[Pattern]) -> Tensor | None:
    """The documents of whichever pattern has some."""
    return next((part.document for part in parts if part.document is not None), None)


class ImpliedMask(Tensor):
    """A bool mask (B, 1, Nq, Nk) kept as a pattern, not in memory. It is materialised when an operation reads it.

    Nk > Nq + diagonal is the first pass over an empty static cache, whose unwritten keys come last.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], pattern: Pattern, device: torch.device | str) -> "ImpliedMask":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, shape: tuple[int, ...], pattern: Pattern, device: torch.device | str) -> None:
        self.pattern = pattern
        self.written: Tensor | None = None  # once an operation has read it, and perhaps changed it
        self.kept: tuple = ((), None)  # the lengths for which `options` was called last, and what it returned

    def options(self, Nq: int, Nk: int) -> tuple[slice | None, dict[str, Any]] | None:
        """`Pattern.options`, computed once for all layers."""
        if self.kept[0] != (Nq, Nk):
            self.kept = (Nq, Nk), self.pattern.options(Nq, Nk)
        return self.kept[1]

    def write(self) -> Tensor:
        if self.written is None:
            self.written = self.pattern.dense(self.shape[2], self.shape[3], self.device).expand(self.shape)
        return self.written

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._to_copy.default and args[0].written is None and kwargs.get("dtype") in (None, torch.bool):
            device = kwargs.get("device") or args[0].device  # layers on several devices
            pattern = Pattern(*(x.to(device) if isinstance(x, Tensor) else x for x in args[0].pattern))
            return cls(args[0].shape, pattern, device)
        args, kwargs = tree_map_only(cls, cls.write, (args, kwargs))
        return operation(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ImpliedMask({tuple(self.shape)}, {self.pattern})"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv) → (B, Nq, H, Dv), and None for the weights, which never exist.

    attention_mask: bool, broadcasts to (B, H, Nq, Nk), True = may attend; it holds causality, sliding windows, padding and packed
    documents. None: the module's `is_causal` (or the argument) and `sliding_window` decide, aligned bottom-right. indices (B, Nq, n): the
    only keys that a query attends (DeepSeek-V3.2). cu_seq_lens_q and cu_seq_lens_k (documents + 1): where, in a batch of one, packed
    documents begin and the last one ends, unless a mask separates them. Keys and values are not repeated for grouped-query attention.

    A float attention_mask and position_bias (T5) are added to the scores, softcap (Gemma 2) caps them, s_aux (H,) are sinks (gpt-oss): each
    with its gradient. On a GPU, PyTorch's `scaled_dot_product_attention` serves what is added where no kernel on tensor cores
    does, as in float32 or above 256 columns.

    Raises:
        NotImplementedError: a keyword is set that is not in HARMLESS. TypeError: the mask is neither bool nor float. Otherwise as
            `flash_attention()`.
    """
    Nq, Nk = query.shape[2], key.shape[2]
    pattern = None  # of what a row sees, where it is not a mask in memory
    implied = isinstance(attention_mask, ImpliedMask)
    if implied:
        everything = attention_mask.pattern.hides_nothing  # for all queries
        if attention_mask.written is None and (everything or attention_mask.shape[2:] == (Nq, Nk)):
            pattern = attention_mask.pattern
    elif attention_mask is None:
        causal = Nq > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = others.get("sliding_window") if causal else None
        pattern = Pattern(None if window is None else window - 1, 0 if causal else None, Nk - Nq)
    if others:
        pattern = _check(module, query, attention_mask, pattern, others)
    added = position_bias is not None or (attention_mask is not None and not implied and attention_mask.is_floating_point())
    # Where PyTorch's own kernels add to the scores faster.
    to_torch = added and softcap is None and s_aux is None and not cuda.adds_quickly(query, value)
    attended = None
    options: dict[str, Any] = {}
    dense = indices is not None or (position_bias is not None and to_torch)
    kept = implied and pattern is attention_mask.pattern and not torch.compiler.is_compiling()
    if pattern is not None and not dense and (found := (attention_mask if kept else pattern).options(Nq, Nk)):
        attention_mask, (attended, options) = None, found
    elif implied:
        attention_mask = attention_mask.write()
    elif attention_mask is None and pattern != Pattern(diagonal=Nk - Nq):
        attention_mask = pattern.dense(Nq, Nk, query.device)
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:2], Nk, dtype=torch.bool, device=query.device).scatter_(2, indices.long(), True)
        attention_mask = _both(attention_mask, chosen[:, None])
    bias = position_bias
    if attention_mask is not None and attention_mask.is_floating_point():
        bias, attention_mask = attention_mask if bias is None else bias + attention_mask, None
    if bias is not None and to_torch:
        bias = _both(attention_mask, bias)
        O = functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=True)
        return O.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"attention_mask must be bool (True = may attend) or float (added to the scores), got {attention_mask.dtype}")
        attention_mask = attention_mask[(None,) * (4 - attention_mask.dim())]  # of (Nq, Nk), never taken for a key mask
    if not query.shape[0] == key.shape[0] == value.shape[0]:  # learned queries, once for the whole batch
        B = torch.broadcast_shapes(*((x.shape[0],) for x in (query, key, value)))[0]
        query, key, value = (x.expand(B, -1, -1, -1) for x in (query, key, value))
    if attended is not None:
        key, value = key[:, :, attended], value[:, :, attended]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., attended]
    options = {"mask": attention_mask, **options, "scale": scaling, "dropout_p": dropout}
    if bias is not None:
        options["bias"] = bias
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is None:
        O = flash_attention(query, key, value, **options)  # (B, H, Nq, Dv)
    else:
        O, LSE = flash_attention(query, key, value, **options, return_lse=True)
        O = with_sinks(O, LSE, s_aux)
    return O.transpose(1, 2).contiguous(), None


def _check(module: nn.Module, query: Tensor, attention_mask: Tensor | None, pattern: Pattern | None, others: dict) -> Pattern | None:
    """The pattern, with the documents given by keywords if it has none. Refuses every keyword that is set unless it is known to have no
    effect."""
    if others.get("output_attentions"):
        logger.warning_once('attention weights are never computed: output_attentions=True needs attn_implementation="eager"')
    separated = attention_mask is not None if pattern is None else pattern.document is not None
    ends, k_ends = others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")
    read: frozenset[str] = frozenset()
    if not separated and pattern is not None and ends is not None and query.shape[0] == 1 and (k_ends is ends or torch.equal(ends, k_ends)):
        numbers = torch.arange(len(ends) - 1, device=ends.device)
        pattern = pattern._replace(document=torch.repeat_interleave(numbers, ends.diff().long())[None])
        read = frozenset(("cu_seq_lens_q", "cu_seq_lens_k"))
    harmless = HARMLESS | DOCUMENTS if separated else HARMLESS | read
    refused = [name for name, x in others.items() if name not in harmless and x is not None and x is not False]
    if refused:
        what = ", ".join(refused)
        raise NotImplementedError(f'{type(module).__name__} passes {what}, which is not computed here; use attn_implementation="eager"')
    return pattern


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    """Combines two masks, each bool (True = may attend) or float (added to the scores)."""
    if a is None:
        return b
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if torch.bool not in (a.dtype, b.dtype):
        return a + b
    allowed, added = (a, b) if a.dtype == torch.bool else (b, a)
    return torch.where(allowed, added, torch.finfo(added.dtype).min)
