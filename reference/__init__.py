"""FlashAttention in plain PyTorch, to be read: naive.py, online_softmax.py, flash1.py, flash2.py, then their causal twins."""

from .dropout import Dropout
from .flash1 import flash_attention_backward, flash_attention_forward
from .flash1_causal import flash_attention_causal_backward, flash_attention_causal_forward
from .flash2 import flash_attention2_backward, flash_attention2_forward
from .flash2_causal import flash_attention2_causal_backward, flash_attention2_causal_forward
from .naive import normal_attention, normal_attention_causal
from .score import Score
from .visible import Visible

__all__ = [
    "Dropout",
    "Score",
    "Visible",
    "flash_attention2_backward",
    "flash_attention2_causal_backward",
    "flash_attention2_causal_forward",
    "flash_attention2_forward",
    "flash_attention_backward",
    "flash_attention_causal_backward",
    "flash_attention_causal_forward",
    "flash_attention_forward",
    "normal_attention",
    "normal_attention_causal",
]
