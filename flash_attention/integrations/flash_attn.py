"""The functions of the flash-attn package (Dao-AILab/flash-attention, 2.8), by the same names and signatures: a user changes one import.

    from flash_attention.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

Tensors are (B, N, H, D), as there, of any dtype and on any device that `flash_attention()` takes. dropout_p is rounded to a multiple of
1/256. What is not computed here raises NotImplementedError, which names it: sliding windows, sequences packed one
after another (the varlen functions), and over a cache softcap, ALiBi and rotary embeddings.
"""

import torch
from torch import Tensor

from flash_attention.cache import attend_keys
from flash_attention.interface import flash_attention

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
    """q (B, Nq, H, D), k (B, Nk, Hkv, D), v (B, Nk, Hkv, Dv) → (B, Nq, H, Dv). causal is aligned bottom-right.

    return_attn_probs: return (O, LSE (B, H, Nq), None). The third is the matrix of probabilities, which is never computed: with dropout,
    whose pattern it would show, this raises.

    Raises:
        NotImplementedError: a window other than (-1, -1) and (-1, 0), return_attn_probs with dropout, or deterministic on a GPU without
            torch.use_deterministic_algorithms(True), which is what makes gradients repeat here. Otherwise as `flash_attention()`.
    """
    causal = _causal(causal, window_size)
    scored = {"softcap": softcap or None, "alibi": alibi_slopes}
    if deterministic and q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError("deterministic=True: gradients repeat bit for bit after torch.use_deterministic_algorithms(True)")
    if return_attn_probs and dropout_p:
        raise NotImplementedError("return_attn_probs with dropout: the matrix of probabilities is never computed")
    options = {"causal": causal, "scale": softmax_scale, "dropout_p": dropout_p}
    O, LSE = flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True, **options, **scored)
    return (O.transpose(1, 2), LSE, None) if return_attn_probs else O.transpose(1, 2)


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
    """Not computed yet: raises NotImplementedError."""
    raise NotImplementedError("flash_attn_varlen_func: sequences packed one after another (cu_seqlens) are not computed here")


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
    """Not computed yet: raises NotImplementedError."""
    raise NotImplementedError("flash_attn_varlen_kvpacked_func: sequences packed one after another (cu_seqlens) are not computed here")


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
    """Not computed yet: raises NotImplementedError."""
    raise NotImplementedError("flash_attn_varlen_qkvpacked_func: sequences packed one after another (cu_seqlens) are not computed here")


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
        cache_leftpad: int32 (B,), the first token that may be attended.
        block_table: int32 (B, pages of a sequence), the page in which tokens page_size · p … lie.
        causal: aligned bottom-right, the last query sees the last token.
        num_splits: has no effect: the number follows from the sizes.

    Returns:
        (B, Nq, H, D), and LSE (B, H, Nq) if return_softmax_lse. No gradients.

    Raises:
        NotImplementedError: a window other than (-1, -1) and (-1, 0), softcap, alibi_slopes, rotary_cos, rotary_sin; gradients.
        TypeError, ValueError: shapes, dtypes or devices do not fit, or, where lengths are on the CPU, the cache is too short. Nothing
            has been written then.
    """
    causal = _causal(causal, window_size)
    _refuse(softcap=softcap, alibi_slopes=alibi_slopes, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    capacity = _check_cache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    B, device = q.shape[0], q.device
    n = 0 if k is None else k.shape[1]
    before = capacity if cache_seqlens is None else cache_seqlens
    known = (before + n, True) if isinstance(before, int) else (None, False)
    if isinstance(before, int):
        before = torch.full((B,), before, dtype=torch.int32, device=device)
    if cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # a batch of the cache is one page of N tokens
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
        q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), before + n, cache_leftpad, block_table, capacity, known,
        causal=causal, scale=softmax_scale, return_lse=return_softmax_lse, backend=None,
    )  # fmt: skip
    return (O[0].transpose(1, 2), O[1]) if return_softmax_lse else O.transpose(1, 2)


def _causal(causal: bool, window_size: tuple[int, int]) -> bool:
    """Whether a call is causal, which a window of all keys to the left and none to the right is too."""
    left, right = window_size
    if left >= 0 or right > 0:
        raise NotImplementedError(f"window_size {tuple(window_size)}: sliding windows are not computed here")
    return causal or right == 0


def _refuse(**settings) -> None:
    for name, x in settings.items():
        if x is not None and (isinstance(x, Tensor) or x):
            raise NotImplementedError(f"{name} is not computed here")


def _check_cache(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table) -> int:
    """The most tokens of a sequence, if all fits together."""
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
