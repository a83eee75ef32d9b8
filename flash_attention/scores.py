"""What can be done to scores outside a kernel, beside `flash_attention()`'s own softcap, bias and alibi.

    alibi_slopes                  the slopes of ALiBi's paper: alibi=alibi_slopes(H)
    with_sinks                    a learned score that each row may attend to instead of its keys
    rotary, rotary_angles         rotary position embedding of q and k
    relative_position_buckets     T5's: bias=table[relative_position_buckets(Nq, Nk)].permute(2, 0, 1)

Plain PyTorch: any device, any order of derivatives, torch.compile and torch.func. In eager calls on CUDA tensors, `rotary` is a kernel.
"""

import math

import torch
from torch import Tensor

from flash_attention.backends import rotary as kernel
from flash_attention.reference.tiles import lowest, sum_dtype


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of "Train Short, Test Long" (Press et al. 2021, arXiv:2108.12409, section 3): float32 (heads,).

    If the number of heads n is a power of two, 2^(−8/n), 2^(−16/n), …, 2^(−8). Otherwise, as in the authors' code: the slopes for the next
    lower power of two n, then every other slope for 2n.

    Raises:
        ValueError: heads is not a positive integer.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")
    n = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)]
    slopes += [2 ** (-4 * (2 * h + 1) / n) for h in range(heads - n)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def with_sinks(O: Tensor, LSE: Tensor, sinks: Tensor) -> Tensor:
    """Attention in which the softmax of each row has one more score, the head's sink, which has no value: (B, H, Nq, Dv), as O.

    gpt-oss (arXiv:2508.10925) learns one per head; a sink of zero is "softmax off by one". Exact: with e^sink in the sum, every probability
    shrinks by Σ / (Σ + e^sink) = sigmoid(LSE − sink), so no kernel needs to know about it. Gradients flow through O, LSE and sinks, because
    `flash_attention()`'s LSE is differentiable.

    Args:
        O, LSE: (B, H, Nq, Dv) and (B, H, Nq), of `flash_attention(…, return_lse=True)`.
        sinks: float, (H,) or (B, H). LSE including the sink is torch.logaddexp(LSE, sinks[..., None]).

    Raises:
        TypeError: sinks is not a float tensor. ValueError: its shape, or those of O and LSE, do not fit.

    >>> O, LSE = flash_attention(q, k, v, causal=True, return_lse=True)
    >>> O = with_sinks(O, LSE, sinks)
    """
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise TypeError(f"sinks must be a float tensor, (H,) or (B, H), got {got}")
    if O.dim() != 4 or LSE.shape != O.shape[:3]:
        raise ValueError(f"O must be (B, H, Nq, Dv) and LSE (B, H, Nq), got {tuple(O.shape)} and {tuple(LSE.shape)}")
    B, H = O.shape[:2]
    if sinks.shape not in ((H,), (B, H)):
        raise ValueError(f"sinks must have shape (H,) = ({H},) or (B, H) = ({B}, {H}), got {tuple(sinks.shape)}")
    LSE = LSE.masked_fill(LSE.isneginf(), lowest(LSE.dtype))  # in a row that attends nothing, O = 0 whatever the factor
    share = (LSE - sinks[..., None].to(LSE.dtype)).sigmoid()
    return (O * share[..., None]).to(O.dtype)


def rotary_angles(positions: Tensor, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (…, N, size / 2), of the angles position · base^(−2f / size), f = 0, 1, … (RoFormer, Su et al. 2021,
    arXiv:2104.09864, section 3.2.2). positions: (…, N), any numbers.

    Raises:
        ValueError: size is odd or not positive.
    """
    if size < 2 or size % 2:
        raise ValueError(f"the size of what is rotated must be even and positive, got {size}")
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angles = positions.to(torch.float64)[..., None] * frequencies  # float32 is too coarse for the angle of position 10⁶
    return angles.cos().float(), angles.sin().float()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of features by a position's angles (RoFormer, Su et al. 2021, arXiv:2104.09864, equation 34): as x.

    Args:
        x: (B, H, N, D), queries or keys.
        cos, sin: (N, R / 2) or (B, N, R / 2), R ≤ D: the first R features are rotated, the others stay.
        interleaved: the pairs are features (0, 1), (2, 3), …, as in the paper; otherwise (0, R/2), (1, R/2 + 1), …, as Llama has them.

    Computed in float32 (float64 for float64) and rounded once. On a GPU an eager call in float32, float16 or bfloat16 is one kernel
    (cuda/rotary.cu), and so is its backward, if rows of x begin at multiples of 16 bytes, and D and R / 2 are multiples of 16 bytes too;
    in any other call, or where angles get a gradient, it is this formula.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, N, D), got {tuple(x.shape)}")
    B, _, N, D = x.shape
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape not in ((N, half), (B, N, half)) or 2 * half > D:
        wanted = f"(N, R / 2) or (B, N, R / 2) with N = {N}, B = {B}, R ≤ {D}"
        raise ValueError(f"cos and sin must be {wanted}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    return _turn(x, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """`rotary` of checked arguments. back: by the opposite angles."""
    if kernel.serves(x, cos, sin):
        return kernel.Rotary.apply(x, cos, sin, interleaved, back, _turn)
    half = cos.shape[-1]
    dtype = sum_dtype(x)
    sin = -sin if back else sin
    cos, sin = (y.to(dtype) if y.dim() == 2 else y[:, None].to(dtype) for y in (cos, sin))  # (N, R/2) or (B, 1, N, R/2)
    rotated, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    a, b = rotated.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def relative_position_buckets(
    Nq: int,
    Nk: int,
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """T5's buckets of relative positions (Raffel et al. 2019, arXiv:1910.10683, section 2.1): int64 (Nq, Nk), each in 0 … buckets − 1.

    Row i stands at column p = i + Nk − Nq. Half of the buckets hold one distance each, the other half ranges that grow logarithmically up
    to max_distance; the last one holds everything beyond. bidirectional: half of the buckets are for columns after p, the other half for p
    and before; otherwise columns after p share p's bucket, because a causal mask hides them.

    Raises:
        ValueError: there are fewer than 2 buckets (4 if bidirectional), or max_distance lies among the exact ones.

    >>> table = torch.nn.Embedding(32, H)
    >>> bias = table(relative_position_buckets(Nq, Nk)).permute(2, 0, 1)  # (H, Nq, Nk)
    """
    half = buckets // 2 if bidirectional else buckets
    exact = half // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"buckets and max_distance do not fit, got {buckets} and {max_distance}")
    after = torch.arange(Nk, device=device) - (torch.arange(Nq, device=device) + Nk - Nq)[:, None]  # j − p
    distance = after.abs() if bidirectional else (-after).clamp(min=0)
    logarithmic = (distance.clamp(min=1) / exact).log() / math.log(max_distance / exact) * (half - exact)
    far = (exact + logarithmic.long()).clamp(max=half - 1)
    bucket = torch.where(distance < exact, distance, far)
    return bucket + (after > 0) * half if bidirectional else bucket
