"""What `torch.utils.flop_counter` counts for the ops: products alone, two operations for each multiplication, as for torch's own attention.

Causality and masks do not reduce the count, and key/value heads count for every query head that reads them, as in torch.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from flash_attention import autograd

# For each op: how many of its products have D columns (or sum over D), how many Dv, and the index of its argument q.
PRODUCTS = {
    "forward": (1, 1, 0),  # Q Kᵀ; P V
    "backward": (3, 2, 2),  # Q Kᵀ again, dS K, dSᵀ Q; dO Vᵀ, Pᵀ dO
    "second_backward": (7, 5, 5),  # counted in reference/second_derivative.py
}


def _formula(of_D: int, of_Dv: int, first: int):
    def flops(*arguments, **_) -> int:
        (B, H, Nq, D), (_, _, Nk, _), (_, _, _, Dv) = arguments[first : first + 3]  # shapes of q, k, v
        return 2 * B * H * Nq * Nk * (of_D * D + of_Dv * Dv)

    return flops


for _name, _products in PRODUCTS.items():
    register_flop_formula(getattr(getattr(torch.ops, autograd.library.ns), _name))(_formula(*_products))
