"""nn.Module layers around `flash_attention()`.

One file because the layers share their options and how they divide heads.
"""

import functools
import inspect
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from flash_attention.backends import check_name
from flash_attention.interface import check_softcap, check_window, flash_attention
from flash_attention.scores import alibi_slopes

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

CHUNKED = "from flash_attention.integrations.earlier import ChunkedFlashAttention as FlashAttention"
# Arguments of other FlashAttentions → what to write here instead.
ADVICE = {
    "head_dim": "for attention without projections: from flash_attention import ScaledDotProduct as FlashAttention",
    "embed_size": f"for the chunked module's arguments: {CHUNKED}",
    "chunk_size": f"chunk_size is now called block_size; for the chunked module's arguments: {CHUNKED}",
    "softmax_scale": "for packed qkv: from flash_attention.integrations.earlier import PackedFlashAttention as FlashAttention",
}
ADVICE["attention_dropout"] = ADVICE["softmax_scale"]

# A parameter of torch.nn.MultiheadAttention → the layer's parameters that it stacks row by row.
COPIES = {
    "in_proj_weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
    "q_proj_weight": ("to_q.weight",),
    "k_proj_weight": ("to_k.weight",),
    "v_proj_weight": ("to_v.weight",),
    "in_proj_bias": ("to_q.bias", "to_k.bias", "to_v.bias"),
    "out_proj.weight": ("to_out.weight",),
    "out_proj.bias": ("to_out.bias",),
}


def _advises(init):
    """For wrong arguments, raises Python's own TypeError, extended by what to write instead."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self, *arguments, **settings):
        try:
            signature.bind(self, *arguments, **settings)
        except TypeError as error:
            advice = [ADVICE[name] for name in settings if name in ADVICE]
            if len(arguments) > 2:
                advice = [f"after heads, arguments go by name, such as dim_head or block_size; for the chunked module's: {CHUNKED}"]
            elif not arguments and not settings:
                advice = [ADVICE["head_dim"]]
            raise TypeError("; ".join([f"FlashAttention(dim, heads=8, *, dim_head=64, …): {error}", *advice[:1]])) from None
        init(self, *arguments, **settings)

    return checked


class FlashAttention(nn.Module):
    """Multi-head attention with its projections (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2), computed by `flash_attention()`.

    Args:
        dim: width of the input and of the output.
        heads, dim_head: query heads, and the size of each.
        causal: aligned bottom-right, as in `flash_attention()`.
        window: (left, right), as in `flash_attention()`: how far a row sees.
        dropout: probability of dropping an attention weight, in training mode only. `torch.manual_seed` governs it.
        kv_heads: key/value heads, which divide `heads` (grouped-query attention); as many as `heads` unless given.
        block_size: as in `flash_attention()`: rows and columns of a tile of scores. The layer then runs the reference, on any device.
        mixed_precision: float32 and float64 queries, keys and values attend in bfloat16 (in float16 on a GPU before compute capability
            8.0, which has no bfloat16); the projections keep their own dtype.
        backend: as in `flash_attention()`.
        bias: whether the four projections have one.
        softcap: as in `flash_attention()`.
        alibi: scores fall with distance, by the slopes of `flash_attention.scores.alibi_slopes`.
        key_dim, value_dim: widths of keys and of values; `dim` and `key_dim` unless given.
        parallel: a ProcessGroup, or a DeviceMesh of one dimension, over whose ranks the sequence is spread: the layer then takes and
            returns this rank's share, cut by `flash_attention.parallel.shard(x, parallel, dim=1)`, and attends over the whole sequence.
        order: of the shares, "zigzag" or "contiguous", as in `flash_attention.parallel`.
        q_bucket_size, k_bucket_size: arguments of FlashAttention2.0, whose code runs unchanged. They do not change a result: tiles are the
            backend's choice, or `block_size`.

    `causal`, `window`, `softcap`, `dropout`, `mixed_precision`, `backend` and `block_size` are attributes that may be set later. A
    projection may be replaced by any module that gives (B, N, heads · dim_head), or (B, N, heads, dim_head): a Sequential that normalises
    each head of queries and keys, for example.

    The state_dict holds `to_q.weight` (heads · dim_head, dim), `to_k.weight` (kv_heads · dim_head, key_dim), `to_v.weight`
    (kv_heads · dim_head, value_dim), `to_out.weight` (dim, heads · dim_head) and, with bias, `to_q.bias`, `to_k.bias`, `to_v.bias` and
    `to_out.bias`; nothing else. Head h has rows h · dim_head … (h + 1) · dim_head − 1 of `to_q`, and so on.

    A state_dict with `to_kv.weight`, as FlashAttention2.0 has it, loads too: its first half is `to_k.weight`.

    Raises:
        TypeError: arguments do not fit; the message says what code written for an earlier FlashAttention becomes.
        ValueError: a size is not a positive integer, kv_heads does not divide heads, dropout is not in [0, 1), there is no such backend, or
            a backend other than the reference is asked for together with block_size.
        NotImplementedError: parallel is True, as in FlashAttention2.0.

    >>> layer = FlashAttention(512, heads=8, dim_head=64, causal=True)
    >>> layer(torch.randn(2, 100, 512)).shape
    torch.Size([2, 100, 512])
    """

    @_advises
    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        dim_head: int = 64,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        block_size: int | None = None,
        mixed_precision: bool = False,
        backend: str | None = None,
        bias: bool = False,
        key_dim: int | None = None,
        value_dim: int | None = None,
        softcap: float | None = None,
        alibi: bool = False,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
        parallel: "ProcessGroup | DeviceMesh | bool" = False,
        order: str = "zigzag",
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        key_dim = dim if key_dim is None else key_dim
        value_dim = key_dim if value_dim is None else value_dim
        _check_sizes(dim=dim, heads=heads, dim_head=dim_head, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads {heads} and kv_heads {kv_heads}")
        _check_dropout(dropout)
        _check_buckets(q_bucket_size, k_bucket_size)
        if parallel is True:
            raise NotImplementedError(
                "parallel=True: wrap the model in torch.nn.parallel.DistributedDataParallel instead; parallel=mesh spreads the sequence"
            )
        check_name(backend)
        if block_size is not None:
            _check_sizes(block_size=block_size)
            if backend not in (None, "reference"):
                raise ValueError(f"block_size sets the reference's tiles and backend {backend!r} has its own, got block_size {block_size}")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        if window is not None:
            check_window(window)
        if softcap is not None:
            check_softcap(softcap)
        self.softcap = softcap
        self.register_buffer("alibi", alibi_slopes(heads) if alibi else None, persistent=False)
        self.causal, self.window, self.dropout, self.mixed_precision = causal, window, dropout, mixed_precision
        self.block_size, self.backend, self.parallel, self.order = block_size, backend, parallel or None, order
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_k = nn.Linear(key_dim, kv_heads * dim_head, bias=bias)
        self.to_v = nn.Linear(value_dim, kv_heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        mask: Tensor | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
        *,
        value: Tensor | None = None,
        context: Tensor | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """query (B, Nq, dim) → (B, Nq, dim), in the projections' dtype.

        `layer(x)` is self-attention and `layer(x, context)` cross-attention: key (B, Nk, key_dim) is the query unless given, value
        (B, Nk, value_dim) the key unless given. Three streams go by name, because others order them differently:
        `layer(query, key=key, value=value)`.

        mask: bool, True = may attend: (B, Nk) for keys, or anything that broadcasts to (B, heads, Nq, Nk). A (Nq, Nk) mask goes in as
        `mask[None, None]`, because with Nq = B it would be taken for a key mask. A row that may attend nothing gives `to_out`'s bias.

        score_bias: float, broadcasts to (B, heads, Nq, Nk), added to the scores: `flash_attention()`'s bias.

        context is another name of key, and q_bucket_size and k_bucket_size change nothing: FlashAttention2.0 has them.

        Raises:
            TypeError: an argument is no tensor, the mask is not bool, or key and context are both given. ValueError: shapes do not fit, or
            the layer is parallel and gets a mask or has a block_size. What `parallel_attention` raises, if it is.
        """
        if context is not None:
            if key is not None:
                raise TypeError("context is another name of key: one of them is enough")
            key = context
        if mask is not None and not _stands_in(mask) and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"mask, the third positional argument, must be a torch.bool tensor (True = may attend), got {got}; for a 0/1 mask pass "
                f"mask.bool(). Three streams go by name: layer(query, key=key, value=value); for (values, keys, queries): {CHUNKED}"
            )
        _check_buckets(q_bucket_size, k_bucket_size)
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self._project("query", query), self._project("key", key), self._project("value", value)  # (B, heads, N, dim_head), views
        dtype = q.dtype
        if self.mixed_precision and dtype.itemsize > 2:
            q, k, v = (x.to(_half(x.device)) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "backend": self.backend, "dropout_p": dropout_p}
        scored: dict[str, Any] = {"softcap": self.softcap, "bias": score_bias, "alibi": self.alibi}
        if self.parallel is None:
            O = flash_attention(q, k, v, mask, **options, **scored, block_size=self.block_size)
        elif mask is not None or self.block_size is not None:
            raise ValueError("a layer that is parallel takes no mask and no block_size; causal and window say what a row of the whole sees")
        elif scored.pop("bias") is not None:
            raise ValueError("a layer that is parallel takes no score_bias")
        else:
            from flash_attention.parallel import parallel_attention  # imported here, for builds of torch without torch.distributed

            O = parallel_attention(q, k, v, **options, **scored, group=self.parallel, order=self.order)
        return self.to_out(O.transpose(1, 2).flatten(2).to(dtype))  # type: ignore[union-attr]

    def _project(self, stream: str, x: Tensor) -> Tensor:
        """(B, N, width) → (B, heads or kv_heads, N, dim_head), a view of the output of the stream's projection."""
        name, heads = {"query": ("to_q", self.heads), "key": ("to_k", self.kv_heads), "value": ("to_v", self.kv_heads)}[stream]
        projection = getattr(self, name)
        _check_shape(stream, x, "B", "N", getattr(projection, "in_features", "any width"))
        projected = projection(x)
        if not _stands_in(projected) and projected.shape[2:] not in ((heads * self.dim_head,), (heads, self.dim_head)):
            wanted = f"(B, N, {heads * self.dim_head}) or (B, N, {heads}, {self.dim_head})"
            raise ValueError(f"{name} must give {wanted}, got {tuple(projected.shape)}")
        return projected.flatten(2).unflatten(2, (heads, self.dim_head)).transpose(1, 2)

    def _apply(self, *arguments, **settings):
        """Moves the slopes to the new device too; they stay float32."""
        super()._apply(*arguments, **settings)
        if self.alibi is not None:
            self.alibi = alibi_slopes(self.heads, self.alibi.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        both = state_dict.pop(f"{prefix}to_kv.weight", None)
        if both is not None:
            state_dict[f"{prefix}to_k.weight"], state_dict[f"{prefix}to_v.weight"] = both.chunk(2)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __setstate__(self, state: dict) -> None:
        """Layers pickled when block_size was called chunk_size load too."""
        state = dict(state)
        state["block_size"] = state.pop("chunk_size", state.get("block_size"))
        for name, value in (("window", None), ("parallel", None), ("order", "zigzag"), ("softcap", None)):
            state.setdefault(name, value)
        state["_buffers"] = {"alibi": None, **state["_buffers"]}
        super().__setstate__(state)

    def extra_repr(self) -> str:
        settings = "heads", "kv_heads", "dim_head", "causal", "window", "dropout", "block_size", "mixed_precision", "backend"
        shown = [f"{name}={getattr(self, name)!r}" for name in settings]
        shown += [f"softcap={self.softcap}"] * (self.softcap is not None) + ["alibi=True"] * (self.alibi is not None)
        shown += [] if self.parallel is None else [f"parallel={self.parallel!r}", f"order={self.order!r}"]
        return ", ".join(shown)


class ScaledDotProduct(nn.Module):
    """`flash_attention()` as a module without parameters, for use inside others: q, k, v (B, H, N, head_dim) → (B, H, Nq, head_dim).

    dropout acts on attention weights, in training mode only. causal is aligned bottom-right.

    Raises:
        ValueError: at construction for a head_dim that is not a positive integer or a dropout outside [0, 1); when called, for tensors
            without 4 dimensions or of another head size. Everything else is as in `flash_attention()`.

    >>> attend = ScaledDotProduct(head_dim=64, causal=True)
    >>> attend(*torch.randn(3, 2, 8, 100, 64)).shape
    torch.Size([2, 8, 100, 64])
    """

    def __init__(self, head_dim: int = 64, dropout: float = 0.0, causal: bool = False):
        super().__init__()
        _check_sizes(head_dim=head_dim)
        _check_dropout(dropout)
        self.head_dim, self.dropout, self.causal = head_dim, dropout, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool, True = may attend, (B, Nk) or broadcastable to (B, H, Nq, Nk)."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_shape(name, x, "B", "H", "N", self.head_dim)
        return flash_attention(q, k, v, mask, causal=self.causal, dropout_p=self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, dropout={self.dropout}, causal={self.causal}"


def from_multihead_attention(mha: nn.MultiheadAttention) -> FlashAttention:
    """A `FlashAttention` with copies of the parameters of `mha`, its dropout and training mode, and so its outputs. Each copy has the
    device, dtype and requires_grad of its original: what was frozen stays frozen. No random number is drawn.

    Differences:
        The layer takes and returns (B, N, dim). Of an `mha` with batch_first=False, which has (N, B, dim), transpose both.
        Three streams go by name: `layer(query, key=key, value=value)`.
        It returns the output alone, not a pair with the attention weights.
        Masks are inverted: `mha` hides where key_padding_mask (B, Nk) or a bool attn_mask (Nq, Nk) is True, the layer attends where mask
        is True. `mask=~key_padding_mask`; `mask=~attn_mask[None, None]`; `mask=~(key_padding_mask[:, None, None] | attn_mask)` for both;
        `mask=~attn_mask.unflatten(0, (B, heads))` for one of shape (B · heads, Nq, Nk).
        Where `mha` gives NaN, for a row that may attend nothing, the layer gives `to_out`'s bias.

    Raises:
        TypeError: `mha` is not a torch.nn.MultiheadAttention.
        NotImplementedError: a copy of its parameters would not compute what `mha` does: it has add_bias_kv or add_zero_attn, which add keys
            that no projection gives, a forward of its own, a weight that is computed (parametrized, pruned), or hooks.
        ValueError: its dropout is 1.
    """
    if not isinstance(mha, nn.MultiheadAttention):
        raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
    if mha.bias_k is not None or mha.add_zero_attn:
        raise NotImplementedError(
            f"keys beyond the projected ones are not supported, got add_bias_kv={mha.bias_k is not None}, add_zero_attn={mha.add_zero_attn}"
        )
    if type(mha).forward is not nn.MultiheadAttention.forward:
        raise NotImplementedError(f"{type(mha).__name__} has a forward of its own, which the converted layer would not run")
    sources = {name: x for name in COPIES if (x := attrgetter(name)(mha)) is not None}
    for name, x in sources.items():
        if not isinstance(x, nn.Parameter):
            raise NotImplementedError(f"{name} is computed from other parameters (parametrized or pruned): make that permanent first")
    hooked = [name for name, x in sources.items() if x._backward_hooks or x._post_accumulate_grad_hooks]
    hooked += ["the module"] * any((mha._forward_hooks, mha._forward_pre_hooks, mha._backward_hooks, mha._backward_pre_hooks))
    if hooked:
        raise NotImplementedError(f"hooks do not carry over, got some on {', '.join(hooked)}: remove them, convert, then hook the layer")

    with torch.device("meta"):  # shapes alone: every parameter is set below
        widths = {"dim_head": mha.head_dim, "key_dim": mha.kdim, "value_dim": mha.vdim}
        layer = FlashAttention(mha.embed_dim, mha.num_heads, dropout=mha.dropout, **widths)
    for name, x in sources.items():
        for part, copy in zip(x.chunk(len(COPIES[name])), COPIES[name], strict=True):
            projection, kind = copy.split(".")
            setattr(getattr(layer, projection), kind, nn.Parameter(part.detach().clone(), requires_grad=x.requires_grad))
    return layer.train(mha.training)


def _half(device: torch.device) -> torch.dtype:
    lacks_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if lacks_bfloat16 else torch.bfloat16


def _stands_in(x) -> bool:
    """Whether x is a placeholder for a tensor of unknown shape, such as a torch.fx.Proxy."""
    return not isinstance(x, Tensor) and has_torch_function_variadic(x)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_buckets(*sizes: int | None) -> None:
    for name, size in zip(("q_bucket_size", "k_bucket_size"), sizes, strict=True):
        if size is not None:
            _check_sizes(**{name: size})


def _check_dropout(p: float) -> None:
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), got {p!r}")


def _check_shape(name: str, x: Tensor, *shape: str | int) -> None:
    """`shape`: names for dimensions of any size; a number for the last dimension if its size is fixed."""
    if _stands_in(x):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or (isinstance(shape[-1], int) and x.shape[-1] != shape[-1]):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}")
