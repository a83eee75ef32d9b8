"""A cache of keys and values for text generation, and attention that reads them in place.

    cache = KeyValueCache(layers=32, B=4, Hkv=8, D=128, capacity=4096, dtype=torch.bfloat16, device="cuda")
    cache[layer].append(k, v)  # (4, 8, n, 128): the next n tokens of each sequence
    O = attend(q, cache[layer])  # (4, H, n, 128): their queries

Memory is set aside once: `capacity` tokens for each sequence, or, with a page_size, a pool of pages that sequences take as they grow
(PagedAttention, Kwon et al. 2023, arXiv:2309.06180). How long each sequence is, is kept on the device: an append and an attend may be
captured in a CUDA graph.

One file because contiguous and paged caches have one interface, and `attend` reads both.
"""

import torch
from torch import Tensor

from flash_attention.backends import BACKENDS, check_name
from flash_attention.backends.split_keys import Plan
from flash_attention.build import BuildError
from flash_attention.interface import DTYPES, _checked_scores, flash_attention
from flash_attention.reference.tiles import sum_dtype
from flash_attention.scores import rotary as rotate

RUNG = "split_keys"
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = torch.finfo(FLOAT8).max
ROUNDED = 256  # plans are made for lengths rounded up to a multiple of this: one plan serves as many generated tokens


class KeyValueCache:
    """Keys and values of every layer of a model. `cache[layer]` is what one layer appends to and attends over.

    Attributes:
        lengths: int32 (layers, B) on the device, tokens that each layer has of each sequence.
        starts: int32 (B,), tokens at the beginning of each sequence that are padding, or None (`pad_left`).
        scales: float32 (layers, 2, Hkv), what float8 keys and values are multiplied by; None unless they are float8.
        block_table: int32 (B, pages of a sequence), the page in which tokens page_size · p … of a sequence lie; an entry
            without a page yet is the number of pages. None without pages.
    """

    def __init__(
        self,
        layers: int,
        B: int,
        Hkv: int,
        D: int,
        capacity: int,
        *,
        Dv: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_size: int | None = None,
        pages: int | None = None,
        float8: bool = False,
    ):
        """
        Args:
            layers, B, Hkv, D: numbers of layers, sequences and key/value heads, and the head size; Dv that of the values, D unless given.
            capacity: the most tokens of a sequence.
            dtype: float32, float16, bfloat16 or float64.
            page_size: tokens of a page; the kernel reads multiples of 16. None: each sequence has its own memory for `capacity` tokens.
            pages: how many there are for all sequences together, in each layer; as many as `capacity` can need unless given.
            float8: keep e4m3 numbers, half of the memory of float16, with a scale for each head that follows from the first tokens
                appended: numbers twice as large as the largest of those still fit, larger ones become the largest that does. A number
                is kept to about 3 %. The kernel for few queries reads them as they are, anything else a copy in `dtype`.

        Raises:
            ValueError: a size is not a positive integer, or pages are given without a page_size. TypeError: dtype is none of those above.
        """
        Dv = D if Dv is None else Dv
        sizes = {"layers": layers, "B": B, "Hkv": Hkv, "D": D, "Dv": Dv, "capacity": capacity}
        sizes |= {name: n for name, n in (("page_size", page_size), ("pages", pages)) if n is not None}
        for name, n in sizes.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"{name} must be a positive integer, got {n!r}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        if pages is not None and page_size is None:
            raise ValueError(f"pages have a page_size, got pages {pages} and page_size None")
        self.B, self.capacity, self.page_size, self.dtype = B, capacity, page_size, dtype
        self.scales = torch.ones(layers, 2, Hkv, device=device) if float8 else None
        dtype = FLOAT8 if float8 else dtype
        self.starts: Tensor | None = None
        self.block_table: Tensor | None = None
        if page_size is None:
            shape = layers, B, Hkv, capacity
        else:
            columns = -(-capacity // page_size)
            pages = B * columns if pages is None else pages
            shape = layers, pages, Hkv, page_size
            self.pages, self._taken = pages, 0  # pages go out in order; `clear` takes them all back
            self._table = torch.full((B, columns), pages, dtype=torch.int32)  # the host's copy
            self.block_table = self._table.to(device, copy=True)
        # Zeros, because elements that a mask hides are still multiplied, by 0.
        self.keys = torch.zeros(*shape, D, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, Dv, dtype=dtype, device=device)
        self.lengths = torch.zeros(layers, B, dtype=torch.int32, device=device)
        self._layers = [Layer(self, n) for n in range(layers)]

    def __getitem__(self, layer: int) -> "Layer":
        return self._layers[layer]

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)

    def pad_left(self, counts: Tensor | list[int]) -> None:
        """The first counts[b] tokens of sequence b, appended or still to be, are padding that no query sees. counts: (B,), integers."""
        counts = torch.as_tensor(counts)
        if counts.shape != (self.B,) or counts.is_floating_point() or counts.dtype == torch.bool:
            raise ValueError(f"counts must be integers of shape ({self.B},), got {counts.dtype} {tuple(counts.shape)}")
        self.starts = counts.to(self.lengths.device, torch.int32)

    def clear(self) -> None:
        """Forgets all tokens and padding, and takes all pages back."""
        self.lengths.zero_()
        self.starts = None
        for layer in self._layers:
            if layer.longest is not None:  # unknown: a CUDA graph may append without the host's knowledge
                layer.longest, layer.equal = 0, True
        if self.block_table is not None:
            self._taken = 0
            self._table.fill_(self.pages)
            self.block_table.copy_(self._table)

    def reserve(self, tokens: int) -> None:
        """Allocates pages for the first `tokens` tokens of every sequence. An append does so itself, unless a CUDA graph captures it.

        Raises:
            ValueError: `tokens` is more than the capacity. MemoryError: there are not enough free pages; none has been allocated.
        """
        if tokens > self.capacity:
            raise ValueError(f"{tokens} tokens do not fit in a capacity of {self.capacity}")
        if self.block_table is None:
            return
        columns = -(-tokens // self.page_size)
        missing = self._table[:, :columns] == self.pages
        needed = int(missing.sum())
        if not needed:
            return
        if self._taken + needed > self.pages:
            raise MemoryError(f"{tokens} tokens of {self.B} sequences need {needed} more pages, and {self.pages - self._taken} are left")
        self._table[:, :columns][missing] = torch.arange(self._taken, self._taken + needed, dtype=torch.int32)
        self._taken += needed
        self.block_table.copy_(self._table)


class Layer:
    """One layer of a KeyValueCache.

    Attributes:
        longest: no sequence has more tokens; None once an append has been captured in a CUDA graph: then only the device knows.
        equal: whether all sequences are known to have `longest` tokens.
    """

    def __init__(self, cache: KeyValueCache, number: int):
        self.cache, self.keys, self.values, self.lengths = cache, cache.keys[number], cache.values[number], cache.lengths[number]
        self.scales = None if cache.scales is None else cache.scales[number]  # (2, Hkv)
        self.longest: int | None = 0
        self.equal = True

    def append(
        self,
        k: Tensor,
        v: Tensor,
        counts: Tensor | None = None,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
    ) -> None:
        """Appends the next n tokens of each sequence.

        Args:
            k: (B, Hkv, n, D), v: (B, Hkv, n, Dv), any strides.
            counts: integers (B,): only the first counts[b] ≤ n of a sequence's n tokens are appended, the others are filler; all n
                unless given.
            rotary: tables cos and sin, float (positions, R / 2) (`scores.rotary_angles`): the first R features of a key are rotated by the
                angles of its position, which counts from its sequence's first token that is not padding. `attend` rotates queries so.
            interleaved: as in `scores.rotary`.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices do not fit, or the capacity, or the tables' length, is exceeded.
            MemoryError: no page is left.
            NotImplementedError: k or v requires gradients. Nothing has been written then. Only an append that a CUDA graph replays
                cannot be checked on the host: past the capacity it fails with a device-side assertion.
        """
        self._check(k, v, counts)
        n = k.shape[2]
        if rotary is not None:
            check_rotary(rotary, k.device, None if self.longest is None else self.longest + n)
            k = rotated(k, self.lengths, self.cache.starts, rotary, interleaved)
        capturing = k.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.longest is not None and not capturing:
            if self.longest + n > self.cache.capacity:
                raise ValueError(f"{n} tokens more do not fit: up to {self.longest} of a capacity of {self.cache.capacity} are in use")
            self.cache.reserve(self.longest + n)
        places = self.lengths[:, None] + torch.arange(n, device=k.device)  # (B, n)
        if self.cache.block_table is None:
            rows = torch.arange(self.cache.B, device=k.device)[:, None]
        else:
            size = self.cache.page_size
            rows, places = self.cache.block_table.long().gather(1, places // size), places % size
        for n_of_scale, (kept, x) in enumerate(((self.keys, k), (self.values, v))):
            if self.scales is not None:
                kept, x = kept.view(torch.uint8), self._as_float8(x, self.scales[n_of_scale]).view(torch.uint8)
            kept[rows, :, places] = x.transpose(1, 2)
        self.lengths += n if counts is None else counts
        if capturing:
            self.longest = None
        elif self.longest is not None:
            self.longest = self.longest + n if counts is None or k.is_cuda else int(self.lengths.max())
        self.equal = self.equal and counts is None and not capturing

    def _as_float8(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (B, Hkv, n, head size) in the cache's dtype. The first tokens set the scale (Hkv)."""
        if self.longest in (0, None) and x.shape[2]:
            largest = x.abs().amax((0, 2, 3)).float()
            first = torch.where(largest > 0, largest * (2 / FLOAT8_MOST), 1)
            scale.copy_(torch.where(self.lengths.any(), scale, first) if self.longest is None else first)
        return (x.float() / scale[:, None, None]).clamp(-FLOAT8_MOST, FLOAT8_MOST).to(FLOAT8)

    def _check(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        for name, x, cached in (("k", k, self.keys), ("v", v, self.values)):
            wanted = (self.cache.B, cached.shape[1], k.shape[2] if k.dim() == 4 else "n", cached.shape[3])
            if tuple(x.shape) != wanted:
                raise ValueError(f"{name} must have shape (B, Hkv, n, head size) = {wanted}, got {tuple(x.shape)}")
            if x.dtype != self.cache.dtype:
                raise TypeError(f"{name} must be {self.cache.dtype} as the cache, got {x.dtype}")
            if x.device != cached.device:
                raise ValueError(f"{name} must be on {cached.device} as the cache, got {x.device}")
            if torch.is_grad_enabled() and x.requires_grad:
                raise NotImplementedError(f"a cache keeps no gradients, and {name} requires them: call under torch.no_grad()")
        if counts is not None:
            if not isinstance(counts, Tensor) or counts.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"counts must be an int32 or int64 tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
            if counts.shape != (self.cache.B,) or counts.device != k.device:
                raise ValueError(f"counts must have shape ({self.cache.B},) on {k.device}, got {tuple(counts.shape)} on {counts.device}")
            if counts.device.type == "cpu" and not bool(((counts >= 0) & (counts <= k.shape[2])).all()):
                raise ValueError(f"counts must be between 0 and n = {k.shape[2]}, got {counts.tolist()}")


def check_rotary(tables: tuple[Tensor, Tensor], device: torch.device, most: int | None) -> None:
    """tables: cos and sin. most: the most tokens of a sequence, if the host knows it."""
    cos, sin = tables
    if cos.dim() != 2 or cos.shape != sin.shape or not cos.device == sin.device == device:
        shown = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tables)
        raise ValueError(f"rotary's cos and sin must both be (positions, R / 2) on {device}, got {shown}")
    if most is not None and most > len(cos):
        raise ValueError(f"rotary's tables have {len(cos)} positions, and {most} tokens need one each")


def rotated(
    x: Tensor, before: Tensor, starts: Tensor | None, tables: tuple[Tensor, Tensor], interleaved: bool, stand_still: bool = False
) -> Tensor:
    """x (B, heads, n, D), rotated by the angles of its positions. before: integers (B,), how many tokens precede the first. stand_still:
    all n have the first one's position."""
    first = before if starts is None else before - starts
    places = first[:, None] + torch.arange(x.shape[2], device=x.device) * (not stand_still)  # (B, n)
    return rotate(x, *(table[places.clamp(min=0)] for table in tables), interleaved=interleaved)


def attend(
    q: Tensor,
    layer: Layer,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries of each sequence over all of its tokens in the cache, which are read where they lie.

    Args:
        q: (B, H, Nq, D) in the cache's dtype; Hkv divides H. Those of the tokens appended last, if causal.
        layer: `cache[n]`, with the queries' own keys and values appended.
        causal: query i of sequence b sees its tokens j ≤ lengths[b] − Nq + i; otherwise all of them. Padding is never seen.
        scale: of the scores; 1/√D unless given.
        softcap, alibi: as in `flash_attention()`; the newest query stands at its sequence's last token.
        rotary, interleaved: rotates the queries, as `append` does the keys: query i by the angles of token lengths[b] − Nq + i.
        return_lse: return LSE (B, H, Nq) too.
        backend: "split_keys", the kernel for few rows, which reads lengths and pages on the device, or "emulated:split_keys", the same on a
            CPU. With any other name, `flash_attention()` is called, with a mask and, if keys lie in pages, on a copy. None: "split_keys" on
            a GPU if it is the fastest, otherwise `flash_attention()`.

    Returns:
        O (B, H, Nq, Dv), and LSE if asked for. No gradients.

    Raises:
        TypeError, ValueError: q does not fit the cache. NotImplementedError: q requires gradients, the backend asked for cannot serve the
        call, or a CUDA graph captures it and the backend is not split_keys.
    """
    cache = layer.cache
    if q.dim() != 4 or q.shape[0] != cache.B or q.shape[1] % layer.keys.shape[1] or q.shape[3] != layer.keys.shape[3]:
        wanted = f"(B, H, Nq, D) = ({cache.B}, a multiple of {layer.keys.shape[1]}, Nq, {layer.keys.shape[3]})"
        raise ValueError(f"q must have shape {wanted}, got {tuple(q.shape)}")
    if q.dtype != cache.dtype:
        raise TypeError(f"q must be {cache.dtype} as the cache, got {q.dtype}")
    if rotary is not None:
        check_rotary(rotary, q.device, layer.longest)
        q = rotated(q, layer.lengths - q.shape[2], cache.starts, rotary, interleaved)
    known = (layer.longest, layer.equal)
    return attend_keys(
        q, layer.keys, layer.values, layer.lengths, cache.starts, cache.block_table, cache.capacity, known,
        causal=causal, scale=scale, return_lse=return_lse, backend=backend, scales=layer.scales, softcap=softcap, alibi=alibi,
    )  # fmt: skip


def attend_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    block_table: Tensor | None,
    capacity: int,
    known: tuple[int | None, bool] = (None, False),
    *,
    causal: bool,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
    window: tuple[int | None, int | None] | None = None,
    scales: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` on any keys: k and v (B, Hkv, N, D or Dv), or with a block_table int32 (B, pages of a sequence) (pages, Hkv, page_size, D
    or Dv), any strides. lengths, starts: int32 (B,) on their device. known: what the host knows of the lengths, as `Layer.longest` and
    `Layer.equal`. window: (left, right) as `flash_attention()` takes it, aligned with each sequence's end.
    scales: float32 (2, Hkv), where k and v are float8. alibi: slopes (H,) or (B, H)."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError("attention over a cache has no gradients, and an input requires them: call under torch.no_grad()")
    check_name(backend)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    longest, equal = known
    left, right = window or (None, None)
    if right == 0 or q.shape[2] == 1:  # a limit to the right hides nothing from a single query, which stands at the end
        causal, right = causal or right == 0, None
    if left is not None and q.shape[2] == 1:
        first = (lengths - 1 - left).clamp(min=0)
        starts, left = first if starts is None else torch.maximum(starts, first), None
    name = RUNG if backend is None and q.is_cuda else backend
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    softcap, _, alibi = _checked_scores(softcap, None, alibi, q, k)
    if name is not None and name.split(":")[-1] == RUNG and left is right is None:
        most = capacity if longest is None else min(capacity, -(-max(longest, 1) // ROUNDED) * ROUNDED)
        try:
            plan = Plan.of(BACKENDS[name], q, k, v, block_table is not None, most, causal, scale, softcap, alibi)
        except BuildError:
            if backend is not None or capturing:
                raise
        else:
            reason = plan.why_not(k, v)
            if reason is None and (backend is not None or capturing or plan.worthwhile):
                O, LSE = plan(q, k, v, lengths, starts, block_table, scales, return_lse, alibi)
                return (O, LSE) if return_lse else O
            if backend is not None:
                raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}")
    if capturing:
        raise NotImplementedError('only backend "split_keys" reads the lengths on the device, which a CUDA graph requires')
    longest = int(lengths.max()) if longest is None else longest
    if block_table is not None:
        pages = block_table[:, : -(-longest // k.shape[2])].long()
        # A page that has not been allocated yet holds nothing that is seen.
        k, v = (_of_pages(x, pages.clamp(max=x.shape[0] - 1)) for x in (k, v))
    k, v = k[:, :, :longest], v[:, :, :longest]
    if scales is not None:
        k, v = ((x.float() * scale[:, None, None]).to(q.dtype) for x, scale in zip((k, v), scales, strict=True))
    mask = bias = None
    if not equal or starts is not None:
        j, end = torch.arange(longest, device=q.device), lengths[:, None, None, None]
        place = end - torch.arange(q.shape[2], 0, -1, device=q.device)[:, None]  # (B, 1, Nq, 1), the columns at which queries stand
        mask = j < end  # (B, 1, 1, longest)
        limits = (0 if causal else right, lambda n: j <= place + n), (left, lambda n: j >= place - n)
        for limit, allowed in limits:
            mask = mask if limit is None else mask & allowed(limit)
        if starts is not None:
            mask = mask & (j >= starts[:, None, None, None])
        causal, window = False, None
        if alibi is not None and not equal:  # the queries of each sequence stand at different columns
            distance = (place - j).abs().to(sum_dtype(q))
            bias, alibi = -alibi.to(distance.dtype)[..., None, None] * distance, None
    else:
        window = None if left is right is None else (left, right)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "bias": bias, "alibi": alibi}
    return flash_attention(q, k, v, mask, **options, return_lse=return_lse, backend=backend)


def _of_pages(x: Tensor, pages: Tensor) -> Tensor:
    """(pages, Hkv, page_size, D) and page numbers (B, n) → (B, Hkv, n · page_size, D)."""
    as_bytes = x.dtype == FLOAT8  # float8 tensors cannot be indexed everywhere
    found = (x.view(torch.uint8) if as_bytes else x)[pages].transpose(1, 2).flatten(2, 3)
    return found.view(FLOAT8) if as_bytes else found
