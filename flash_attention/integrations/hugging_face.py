"""`flash_attention()` as an attention implementation of Hugging Face transformers.

    from flash_attention.integrations.hugging_face import register

    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation=register())
    model.set_attn_implementation(register())  # a model that is there already

For models that look their attention up in transformers' `AttentionInterface`, as nearly all do since version 5. The file is not called
transformers.py, which would hide the library from a script in this folder.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from flash_attention.backends import cuda
from flash_attention.interface import flash_attention
from flash_attention.scores import with_sinks

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "flash_attention.integrations.hugging_face needs Hugging Face transformers 5 or newer, which the extra `transformers` installs: "
        "pip install 'flash_attention[transformers]', in a clone pip install -e '.[transformers]'"
    ) from error

# Keywords that models pass along without any effect here: `sliding_window` is in the mask already, the others are meant for other layers.
# Any other keyword that is set is refused, whether it is known here or not.
HARMLESS = frozenset(
    ["sliding_window", "max_length_q", "max_length_k", "deterministic", "position_ids", "use_cache", "num_items_in_batch", "grid_thw",
     "input_ids", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"]
)  # fmt: skip
DOCUMENTS = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))  # several documents in one row: harmless if a mask separates them

# Model types that none but `eager` computes rightly, and why.
EAGER_ONLY = {
    "git": "its text layers add the mask to scores of their own",
    "bigbird_pegasus": "its encoder adds the mask to scores of its own",
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


def mask(batch_size: int, q_length: int, kv_length: int, *args, allow_is_causal_skip: bool = True, **others) -> Tensor | None:
    """transformers' own `sdpa_mask`: bool (B, 1, Nq, Nk), True = may attend; an `ImpliedMask` where `sdpa_mask` returns None.

    None does not say whether it stands for causality or for none, for which alignment, nor for how many queries: a model that drops the
    first ones, as Gemma 4 does in layers that share keys and values, must not change what the others see.

    Raises:
        NotImplementedError: the model type is in EAGER_ONLY.
    """
    kind = getattr(others.get("config"), "model_type", None)
    if kind in EAGER_ONLY:
        raise NotImplementedError(f'{kind} needs attn_implementation="eager": {EAGER_ONLY[kind]}')
    made = sdpa_mask(batch_size, q_length, kv_length, *args, allow_is_causal_skip=allow_is_causal_skip, **others)
    if made is not None or torch.compiler.is_compiling():
        return made
    return ImpliedMask((batch_size, 1, q_length, kv_length), allow_is_causal_skip and q_length > 1, others.get("device", "cpu"))


class ImpliedMask(Tensor):
    """A bool mask (B, 1, Nq, Nk) that is not in memory: row i sees columns j ≤ i if causal, else all. Operations see it written out.

    Nk > Nq is the first pass over an empty static cache, whose unwritten keys come last.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], causal: bool, device: torch.device | str) -> "ImpliedMask":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, shape: tuple[int, ...], causal: bool, device: torch.device | str) -> None:
        self.causal = causal
        self.written: Tensor | None = None  # once an operation has seen it, which may have changed it

    def write(self) -> Tensor:
        if self.written is None:
            rows = torch.ones(self.shape[2:], dtype=torch.bool, device=self.device)
            self.written = (rows.tril_() if self.causal else rows).expand(self.shape)
        return self.written

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._to_copy.default and args[0].written is None and kwargs.get("dtype") in (None, torch.bool):
            return cls(args[0].shape, args[0].causal, kwargs.get("device") or args[0].device)  # layers on several devices
        args, kwargs = tree_map_only(cls, cls.write, (args, kwargs))
        return operation(*args, **kwargs)

    def __repr__(self) -> str:
        return f"ImpliedMask({tuple(self.shape)}, causal={self.causal})"


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

    attention_mask: bool, broadcasts to (B, H, Nq, Nk), True = may attend; it holds causality, sliding windows and padding. None: the
    module's `is_causal` (or the argument) decides, aligned bottom-right. indices (B, Nq, n): the only keys that a query attends
    (DeepSeek-V3.2). Keys and values are not repeated for grouped-query attention.

    A float attention_mask and position_bias (T5) are added to the scores, softcap (Gemma 2) caps them, s_aux (H,) are sinks (gpt-oss): each
    with its gradient. On a GPU, PyTorch's `scaled_dot_product_attention` adds to the scores until this project's kernels do.

    Raises:
        NotImplementedError: a keyword is set that is not in HARMLESS. TypeError: the mask is neither bool nor float. Otherwise as
            `flash_attention()`.
    """
    if others:
        _check(module, attention_mask, others)
    Nq, Nk = query.shape[2], key.shape[2]
    causal = False
    if isinstance(attention_mask, ImpliedMask):
        implied = attention_mask.written is None and indices is None
        if implied and not attention_mask.causal:
            attention_mask = None
        elif implied and attention_mask.shape[2:] == (Nq, Nk):
            causal, attention_mask = True, None
            if Nk > Nq:
                key, value = key[:, :, :Nq], value[:, :, :Nq]
                position_bias = None if position_bias is None else position_bias[..., :Nq]
        else:
            attention_mask = attention_mask.write()
    elif attention_mask is None and Nq > 1:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal and indices is not None:
            attention_mask, causal = torch.ones(1, 1, Nq, Nk, dtype=torch.bool, device=query.device).tril_(Nk - Nq), False
    if indices is not None:
        chosen = torch.zeros(*indices.shape[:2], Nk, dtype=torch.bool, device=query.device).scatter_(2, indices.long(), True)
        attention_mask = _both(attention_mask, chosen[:, None])
    bias = position_bias
    if attention_mask is not None and attention_mask.is_floating_point():
        bias, attention_mask = attention_mask if bias is None else bias + attention_mask, None
    if bias is not None and softcap is None and s_aux is None and query.is_cuda and not cuda.SCORES_TIMED:
        if causal:
            attention_mask = torch.ones(1, 1, Nq, key.shape[2], dtype=torch.bool, device=query.device).tril_(key.shape[2] - Nq)
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
    options = {"causal": causal, "scale": scaling, "dropout_p": dropout}
    options |= {name: x for name, x in (("softcap", softcap), ("bias", bias)) if x is not None}
    if s_aux is None:
        O = flash_attention(query, key, value, attention_mask, **options)  # (B, H, Nq, Dv)
    else:
        O = with_sinks(*flash_attention(query, key, value, attention_mask, **options, return_lse=True), s_aux)
    return O.transpose(1, 2).contiguous(), None


def _check(module: nn.Module, attention_mask: Tensor | None, others: dict) -> None:
    """Refuses every keyword that is set and not known to change nothing."""
    if others.get("output_attentions"):
        logger.warning_once('attention weights are never computed: output_attentions=True needs attn_implementation="eager"')
    separated = attention_mask is not None and not (isinstance(attention_mask, ImpliedMask) and attention_mask.written is None)
    harmless = HARMLESS | DOCUMENTS if separated else HARMLESS
    refused = [name for name, x in others.items() if name not in harmless and x is not None and x is not False]
    if refused:
        what = ", ".join(refused)
        raise NotImplementedError(f'{type(module).__name__} passes {what}, which is not computed here; use attn_implementation="eager"')


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    """One mask for two, each bool (True = may attend) or float (added to the scores)."""
    if a is None:
        return b
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if torch.bool not in (a.dtype, b.dtype):
        return a + b
    allowed, added = (a, b) if a.dtype == torch.bool else (b, a)
    return torch.where(allowed, added, torch.finfo(added.dtype).min)
