"""FlashAttention: one interface over readable PyTorch and fast CUDA. `flash_attention.reference` holds the algorithms to read."""

from flash_attention import flops as flops
from flash_attention.interface import flash_attention
from flash_attention.layers import FlashAttention, ScaledDotProduct, from_multihead_attention

__version__ = "0.1.0"
__all__ = ["FlashAttention", "ScaledDotProduct", "flash_attention", "from_multihead_attention"]
