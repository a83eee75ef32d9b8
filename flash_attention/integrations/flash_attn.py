"""The functions of the flash-attn package (Dao-AILab/flash-attention, 2.8), by the same names and signatures: a user changes one import.

    from flash_attention.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

Tensors are (B, N, H, D), as there, of any dtype and on any device that `flash_attention()` takes. dropout_p is rounded to a multiple of
1/256.

One file because it mirrors one module of that package; half of it is signatures.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from flash_attention.cache import attend_keys, check_rotary, rotated
from flash_attention.interface import _seed, flash_attention
from flash_attention.reference.dropout import Dropout
from flash_attention.reference.score import Score, broadcast_alibi
from flash_attention.spans import documents

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q (B, Nq, H, D), k (B, Nk, Hkv, D), v (B, Nk, Hkv, Dv) → (B, Nq, H, Dv). causal and window_size are aligned bottom-right.

    deterministic: gradients repeat bit for bit.
    return_attn_probs: return (O, LSE (B, H, Nq), None). With dropout the third is (B, H, Nq, Nk), the probabilities, negative where they
        are dropped: a matrix that is computed beside the kernels, for checks.

    Raises: as `flash_attention()`.
    """
    options = {"causal": causal, "window": _window(window_size), "scale": softmax_scale, "dropout_p": dropout_p}
    options |= {"softcap": softcap or None, "alibi": alibi_slopes}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seed = _next_seed(q) if return_attn_probs and dropout_p else None
    O, LSE = _attention(q, k, v, options, deterministic)
    probabilities = None
    if seed is not None:
        spans = documents([q.shape[2]], [k.shape[2]], causal=causal, window=_window(window_size)).to(q.device)
        dropout = Dropout(dropout_p, seed, range(q.shape[0]), range(q.shape[1]))
        probabilities = _probabilities(q, k, LSE, spans, softmax_scale, dropout, softcap, alibi_slopes)
    O = O.transpose(1, 2)
    return (O, LSE, probabilities) if return_attn_probs else O


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with kv (B, Nk, 2, Hkv, D)."""
    k, v = kv.unbind(2)
    others = window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, *others)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` with qkv (B, N, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    others = window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, *others)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Sequences packed one after another: q (total of queries, H, D), k and v (total of keys, Hkv, D or Dv) → (total of queries, H, Dv).

    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), where each sequence begins, and where the last one ends; the host reads them. causal and
    window_size are aligned bottom-right in each sequence. max_seqlen_q, max_seqlen_k have no effect.
    block_table: int32 (B, pages of a sequence): k and v are (pages, page_size, Hkv, D or Dv), and copied.
    deterministic, return_attn_probs: as in `flash_attn_func`, with LSE (H, total of queries) and probabilities (B, H, longest, longest).

    ALiBi's distances are those in each sequence. Where slopes differ between sequences, or their queries and keys in number, each
    sequence is a call of its own.

    Raises: as `flash_attention()`.
    """
    lengths, k_lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if block_table is not None:
        page_size = k.shape[1]
        there = torch.arange(block_table.shape[1] * page_size, device=k.device) < k_lengths[:, None]  # (B, tokens of all its pages)
        pages = block_table.long().clamp(0, k.shape[0] - 1)  # a page that no key needs may be any number
        k, v = (x[pages].flatten(1, 2)[there] for x in (k, v))
    window = _window(window_size)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, total, D)
    wants_probabilities = return_attn_probs and dropout_p > 0
    seeds = []
    options = {"scale": softmax_scale, "dropout_p": dropout_p, "softcap": softcap or None}

    def attend(q: Tensor, k: Tensor, v: Tensor, **own) -> tuple[Tensor, Tensor]:
        if wants_probabilities:
            seeds.append(_next_seed(q))
        return _attention(q, k, v, options | own, deterministic)

    each_alone = alibi_slopes is not None and (alibi_slopes.dim() == 2 or not torch.equal(lengths, k_lengths))
    if each_alone:
        parts = (x.split(n.tolist(), 2) for x, n in ((q, lengths), (k, k_lengths), (v, k_lengths)))
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes.expand(len(lengths), -1)
        found = [attend(*part, alibi=one, causal=causal, window=window) for *part, one in zip(*parts, slopes, strict=True)]
        O, LSE = (torch.cat(x, 2) for x in zip(*found, strict=True))
    else:
        spans = documents(lengths, k_lengths, causal=causal, window=window).to(q.device)
        O, LSE = attend(q, k, v, alibi=alibi_slopes, spans=spans)
    probabilities = None
    if wants_probabilities:
        probabilities = q.new_zeros(len(lengths), q.shape[1], int(lengths.max()), int(k_lengths.max()))
        starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), lengths.tolist(), k_lengths.tolist(), strict=False)
        for b, (i, j, n, m) in enumerate(starts):
            # Of one call, dropout counts from where the sequence begins.
            seed, corner, slopes_here = (seeds[b], (0, 0), slopes[b]) if each_alone else (seeds[0], (i, j), alibi_slopes)
            seen = documents([n], [m], causal=causal, window=window).to(q.device)
            dropout = Dropout(dropout_p, seed, range(1), range(q.shape[1]), corner)
            part = q[:, :, i : i + n], k[:, :, j : j + m], LSE[:, :, i : i + n]
            probabilities[b, :, :n, :m] = _probabilities(*part, seen, softmax_scale, dropout, softcap, slopes_here)[0]
    O = O[0].transpose(0, 1)
    return (O, LSE[0], probabilities) if return_attn_probs else O


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with kv (total of keys, 2, Hkv, D)."""
    k, v = kv.unbind(1)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    others = window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, *others)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` with qkv (total, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    others = window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, *others)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Appends k and v to the cache in place, if they are given, and attends over the cache.

    Args:
        q: (B, Nq, H, D). k_cache, v_cache: (batches, N, Hkv, D), or with a block_table (pages, page_size, Hkv, D).
        k, v: (B, n, Hkv, D), written to positions cache_seqlens[b] … + n − 1 of sequence b.
        cache_seqlens: tokens that the cache holds before, an int or int32 (B,); all N unless given.
        cache_batch_idx: int32 (B,), the cache's batch that is sequence b. Where an index comes twice, appended keys may be either's.
        rotary_cos, rotary_sin: (positions, R / 2): k is rotated before it is written, by the angles of its positions; so is q, which then
            stands at the same positions, or, without causal and window_size, at the first of them. rotary_interleaved: `scores.rotary`'s.
        cache_leftpad: int32 (B,), the first token that may be attended. Positions for rotary count padding too.
        block_table: int32 (B, pages of a sequence), the page in which tokens page_size · p … lie.
        causal, window_size: aligned bottom-right, the last query sees the last token.
        num_splits: has no effect: the number follows from the sizes.

    Returns:
        (B, Nq, H, D), and LSE (B, H, Nq) if return_softmax_lse. No gradients.

    Raises:
        NotImplementedError: gradients.
        TypeError, ValueError: shapes, dtypes or devices do not fit, or, where lengths are on the CPU, the cache is too short. Nothing
            has been written then.
    """
    capacity = _check_cache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    B, device = q.shape[0], q.device
    n = 0 if k is None else k.shape[1]
    before = capacity if cache_seqlens is None else cache_seqlens
    known = (before + n, True) if isinstance(before, int) else (None, False)
    if isinstance(before, int):
        before = torch.full((B,), before, dtype=torch.int32, device=device)
    if cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # a batch of the cache is one page of N tokens
    q = q.transpose(1, 2)
    if rotary_cos is not None or rotary_sin is not None:
        tables = rotary_cos, rotary_sin
        if k is None or rotary_cos is None or rotary_sin is None:
            raise ValueError("rotary_cos goes with rotary_sin, and with the k and v that are appended")
        check_rotary(tables, device, known[0])
        stand_still = not causal and _window(window_size) is None
        q = rotated(q, before, None, tables, rotary_interleaved, stand_still)
        k = rotated(k.transpose(1, 2), before, None, tables, rotary_interleaved).transpose(1, 2)
    if n:
        places = before[:, None] + torch.arange(n, device=device)
        if block_table is None:
            rows = torch.arange(B, device=device)[:, None]
        else:
            size = k_cache.shape[1]
            rows, places = block_table.long().gather(1, places // size), places % size
        k_cache[rows, places] = k
        v_cache[rows, places] = v
    O = attend_keys(
        q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), before + n, cache_leftpad, block_table, capacity, known,
        causal=causal, window=_window(window_size), scale=softmax_scale, return_lse=return_softmax_lse, backend=None,
        softcap=softcap or None, alibi=alibi_slopes,
    )  # fmt: skip
    if return_softmax_lse:
        return O[0].transpose(1, 2), O[1]
    return O.transpose(1, 2)  # type: ignore[union-attr]


def _window(window_size) -> tuple[int | None, int | None] | None:
    """window_size as `flash_attention()` takes it; here −1 means no limit."""
    left, right = (None if limit < 0 else int(limit) for limit in window_size)
    return None if left is None and right is None else (left, right)


def _attention(q: Tensor, k: Tensor, v: Tensor, options: dict, deterministic: bool) -> tuple[Tensor, Tensor]:
    """O and LSE."""
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if deterministic and wants_gradients and not torch.are_deterministic_algorithms_enabled():
        return _Deterministic.apply(q, k, v, options)
    return flash_attention(q, k, v, return_lse=True, **options)


class _Deterministic(torch.autograd.Function):
    """`flash_attention()` whose backward, and only that, runs under `torch.use_deterministic_algorithms`, the setting that kernels look
    at."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        ctx.wanted = [n for n, x in enumerate((q, k, v)) if ctx.needs_input_grad[n]]
        inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip((q, k, v), ctx.needs_input_grad, strict=False)]
        with torch.enable_grad():
            O, LSE = flash_attention(*inputs, return_lse=True, **options)
        ctx.graph = inputs, O, LSE
        return O.detach(), LSE.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dO: Tensor, dLSE: Tensor):
        inputs, O, LSE = ctx.graph
        gradients = [None] * 4
        with _deterministic():
            found = torch.autograd.grad((O, LSE), [inputs[n] for n in ctx.wanted], (dO, dLSE), retain_graph=True)
        for n, x in zip(ctx.wanted, found, strict=True):
            gradients[n] = x
        return tuple(gradients)


@contextmanager
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _next_seed(q: Tensor) -> Tensor:
    """The seed that the next call with dropout will draw."""
    with torch.random.fork_rng([q.device] if q.is_cuda else [], enabled=True):
        return _seed(q)


def _probabilities(
    q: Tensor, k: Tensor, LSE: Tensor, spans: Tensor, scale: float | None, dropout: Dropout, softcap: float, slopes: Tensor | None
) -> Tensor:
    """(B, H, Nq, Nk) in q's dtype: softmax of the scores of the columns that each row's span holds, negative where dropped."""
    Nq, Nk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    j = torch.arange(Nk, device=q.device)
    seen = (j >= spans[..., :1]) & (j < spans[..., 1:])
    q_wide, k_wide = q.detach().to(LSE.dtype), k.detach().to(LSE.dtype).repeat_interleave(group, 1)
    S = q_wide @ k_wide.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    score = Score.of(softcap or None, None, None if slopes is None else broadcast_alibi(slopes, *q.shape[:2]), Nk - Nq)
    S = S if score is None else score(S, slice(0, Nq), slice(0, Nk))
    P = (S - LSE.detach()[..., None]).exp().where(seen, 0).to(q.dtype)
    return P.where(dropout.keep(slice(0, Nq), slice(0, Nk)), -P)


def _check_cache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table) -> int:
    """Checks the arguments; returns the most tokens of a sequence."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, length, heads, head size), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(f"attention over a cache has no gradients, and {name} requires them: call under torch.no_grad()")
    B, _, H, D = q.shape
    batches, N, Hkv, _ = k_cache.shape
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[3] != D or 0 in k_cache.shape[1:] or H % Hkv:
        shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
        raise ValueError(f"the caches must have one shape, q's head size and a number of heads that divides q's, got {shapes}")
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together, got one of them")
    if k is not None:
        wanted = (B, k.shape[1], Hkv)
        if k.shape != (*wanted, D) or v.shape != (*wanted, v_cache.shape[3]):
            raise ValueError(f"k and v must have shape (B, n, Hkv, head size) = {wanted} …, got {tuple(k.shape)} and {tuple(v.shape)}")
        if cache_seqlens is None:
            raise ValueError("k and v need cache_seqlens, behind which they are written")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("block_table and cache_batch_idx exclude each other")
    if block_table is None and cache_batch_idx is None and batches != B:
        raise ValueError(f"k_cache must have q's batch size {B}, got {batches}")
    integers = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "block_table": block_table}
    integers |= {"cache_seqlens": cache_seqlens if isinstance(cache_seqlens, Tensor) else None}
    for name, x in integers.items():
        if x is None:
            continue
        if x.dtype != torch.int32 or x.device != q.device:
            raise TypeError(f"{name} must be int32 on {q.device}, got {x.dtype} on {x.device}")
        if x.shape != (B,) and not (name == "block_table" and x.dim() == 2 and x.shape[0] == B):
            raise ValueError(f"{name} must have {B} entries, one for each sequence, got shape {tuple(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    capacity = N if block_table is None else N * block_table.shape[1]
    n = 0 if k is None else k.shape[1]
    if isinstance(cache_seqlens, int) or (cache_seqlens is not None and not q.is_cuda):
        shortest, longest = (cache_seqlens,) * 2 if isinstance(cache_seqlens, int) else (int(x) for x in cache_seqlens.aminmax())
        if shortest < 0 or longest + n > capacity:
            raise ValueError(f"cache_seqlens {shortest} … {longest} and {n} tokens more do not fit in a cache of {capacity}")
    return capacity
