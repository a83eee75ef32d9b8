"""FlashAttention: one interface over readable PyTorch and fast CUDA.

- `flash_attention.reference`: the papers' algorithms, to read.
- `flash_attention.spans`: what each row sees: packed documents, prefixes, chunks.
- `flash_attention.scores`: ALiBi, sinks, rotary positions, relative positions.
- `flash_attention.cache`: keys and values kept while a text is generated.
- `flash_attention.parallel`: one sequence over several GPUs.
- `flash_attention.integrations.sdpa`, `.hugging_face`, `.flash_attn`: in place of PyTorch's own function, in transformers, and under the
  flash-attn package's names.
"""

from flash_attention import flops as flops
from flash_attention.interface import flash_attention
from flash_attention.layers import FlashAttention, ScaledDotProduct, from_multihead_attention

__version__ = "0.1.0"
__all__ = ["FlashAttention", "ScaledDotProduct", "flash_attention", "from_multihead_attention"]
