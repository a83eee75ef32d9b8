"""`flash_attention()` as an attention implementation of Hugging Face transformers.

    from flash_attention.integrations.hugging_face import register

    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation=register())
    model.set_attn_implementation(register())  # a model that is there already

For models that look their attention up in transformers' `AttentionInterface`, as nearly all do since version 5. The file is not called
transformers.py, which would hide the library from a script in this folder.
"""

import torch
from torch import Tensor, nn

from flash_attention.integrations.sdpa import scaled_dot_product_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "flash_attention.integrations.hugging_face needs Hugging Face transformers 5 or newer, which the extra `transformers` installs: "
        "pip install 'flash_attention[transformers]', in a clone pip install -e '.[transformers]'"
    ) from error

# What some models pass and `flash_attention()` does not compute. Left out silently, each would change the result.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "block_indices", "cache", "output_attentions")


def register(name: str = "tiled_attention") -> str:
    """Make `attn_implementation=name` mean `flash_attention()`, for every model of this process; returns the name.

    Masks come from transformers' own `sdpa_mask`: bool (B, 1, Nq, Nk), or None where causality says everything.

    Raises:
        ValueError: the name contains "flash", which transformers takes for an external package and then prepares no such masks.
    """
    if "flash" in name:
        raise ValueError(f'the name must not contain "flash", which transformers treats in its own way, got {name!r}')
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv) → (B, Nq, H, Dv), and None for the weights, which never exist.

    attention_mask: bool, (B, 1 or H, Nq, Nk), True = may attend; it holds causality, sliding windows and padding. None: the module's
    `is_causal` (or the argument) decides. Keys and values are not repeated for grouped-query attention.

    Raises:
        NotImplementedError: an argument of UNSUPPORTED is given. TypeError: the mask is not bool. Otherwise as `flash_attention()`.
    """
    refused = [name for name in UNSUPPORTED if others.get(name) is not None and others[name] is not False]
    if refused:
        raise NotImplementedError(f'{type(module).__name__} asks for {", ".join(refused)}; use attn_implementation="eager"')
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must have dtype torch.bool (True = may attend), got {attention_mask.dtype}")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # `sdpa_mask` leaves the mask out in three cases, and top-left causality fits two: Nq = Nk, and the first pass over an empty static
    # cache, whose unwritten rows come last. The third is a single query, which sees every key.
    is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
    O = scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=True)
    return O.transpose(1, 2).contiguous(), None
