"""FlashAttention: one interface over readable PyTorch and fast CUDA. `flash_attention.reference` holds the algorithms to read."""

from flash_attention.interface import flash_attention

__all__ = ["flash_attention"]
