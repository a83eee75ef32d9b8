"""What `torch.utils.flop_counter` counts for the ops: products alone, two operations for each multiplication, as for torch's own attention.

Causality and masks spare nothing there, and key/value heads count for every query head that reads them.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from flash_attention import autograd

# How many products of an op have D columns (or sum over D), how many Dv, and where its argument q is.
PRODUCTS = {
    "forward": (1, 1, 0),  # Q Kᵀ; P V
    "backward": (3, 2, 2),  # Q Kᵀ again, dS K, dSᵀ Q; dO Vᵀ, Pᵀ dO
    "second_backward": (7, 5, 5),  # reference/second_derivative.py has them all
}


def _formula(of_D: int, of_Dv: int, first: int):
    def flops(*arguments, **_) -> int:
        (B, H, Nq, D), (_, _, Nk, _), (_, _, _, Dv) = arguments[first : first + 3]  # shapes of q, k, v
        return 2 * B * H * Nq * Nk * (of_D * D + of_Dv * Dv)

    return flops


for _name, _products in PRODUCTS.items():
    register_flop_formula(getattr(getattr(torch.ops, autograd.library.ns), _name))(_formula(*_products))
