"""nn.Module layers around `flash_attention()`."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from flash_attention.backends import BACKENDS, reference
from flash_attention.interface import flash_attention


class FlashAttention(nn.Module):
    """Multi-head attention with its projections (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2), computed by `flash_attention()`.

    Args:
        dim: width of the input and of the output.
        heads, dim_head: query heads, and the size of each.
        causal: aligned bottom-right, as in `flash_attention()`.
        dropout: probability of dropping an attention weight, in training mode only. `torch.manual_seed` governs it.
        kv_heads: key/value heads, which divide `heads` (grouped-query attention); as many as `heads` unless given.
        chunk_size: rows and columns of a tile of scores. The layer then runs the reference, on any device: a kernel's tiles are fixed.
        mixed_precision: float32 and float64 queries, keys and values attend in bfloat16 (in float16 on a GPU before compute capability
            8.0, which has no bfloat16); the projections keep their own dtype.
        backend: as in `flash_attention()`.
        bias: whether the four projections have one.
        key_dim, value_dim: widths of keys and of values; `dim` and `key_dim` unless given.

    The state_dict holds `to_q.weight` (heads · dim_head, dim), `to_k.weight` (kv_heads · dim_head, key_dim), `to_v.weight`
    (kv_heads · dim_head, value_dim), `to_out.weight` (dim, heads · dim_head) and, with bias, `to_q.bias`, `to_k.bias`, `to_v.bias` and
    `to_out.bias`; nothing else. Head h has rows h · dim_head … (h + 1) · dim_head − 1 of `to_q`, and so on.

    Raises:
        ValueError: a size is not a positive integer, kv_heads does not divide heads, dropout is not in [0, 1), or a CUDA backend is asked
            for together with chunk_size.

    >>> layer = FlashAttention(512, heads=8, dim_head=64, causal=True)
    >>> layer(torch.randn(2, 100, 512)).shape
    torch.Size([2, 100, 512])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        kv_heads: int | None = None,
        chunk_size: int | None = None,
        mixed_precision: bool = False,
        backend: str | None = None,
        bias: bool = False,
        key_dim: int | None = None,
        value_dim: int | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        key_dim = dim if key_dim is None else key_dim
        value_dim = key_dim if value_dim is None else value_dim
        _check_sizes(dim=dim, heads=heads, dim_head=dim_head, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads {heads} and kv_heads {kv_heads}")
        _check_dropout(dropout)
        if chunk_size is not None:
            _check_sizes(chunk_size=chunk_size)
            if backend not in (None, "reference"):
                raise ValueError(f"chunk_size sets the reference's tiles and backend {backend!r} has its own, got chunk_size {chunk_size}")
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.causal, self.dropout, self.mixed_precision = causal, dropout, mixed_precision
        self.chunk_size, self.backend = chunk_size, backend
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_k = nn.Linear(key_dim, kv_heads * dim_head, bias=bias)
        self.to_v = nn.Linear(value_dim, kv_heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)
        Chunks.register(chunk_size)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """query (B, Nq, dim) → (B, Nq, dim), in the projections' dtype.

        `layer(x)` is self-attention and `layer(x, context)` cross-attention: key (B, Nk, key_dim) is the query unless given, value
        (B, Nk, value_dim) the key unless given.

        mask: bool, True = may attend: (B, Nk) for keys, or anything that broadcasts to (B, heads, Nq, Nk). A (Nq, Nk) mask goes in as
        `mask[None, None]`, because with Nq = B it would be taken for a key mask. A row that may attend nothing gives `to_out`'s bias.

        Raises:
            TypeError: an argument is no tensor, or the mask is not bool. ValueError: shapes do not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, x, projection in (("query", query, self.to_q), ("key", key, self.to_k), ("value", value, self.to_v)):
            _check_shape(name, x, "B", "N", projection.in_features)
        streams = self.to_q(query), self.to_k(key), self.to_v(value)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=self.dim_head) for x in streams)  # (B, heads or kv_heads, N, dim_head), views
        dtype = q.dtype
        if self.mixed_precision and dtype.itemsize > 2:
            q, k, v = (x.to(_half(x.device)) for x in (q, k, v))
        backend = self.backend if self.chunk_size is None else Chunks(self.chunk_size).name
        O = flash_attention(q, k, v, mask, causal=self.causal, dropout_p=self.dropout if self.training else 0.0, backend=backend)
        return self.to_out(rearrange(O, "b h n d -> b n (h d)").to(dtype))

    def __setstate__(self, state: dict) -> None:
        """A layer unpickled in another process meets a registry that does not know its chunk size yet."""
        super().__setstate__(state)
        Chunks.register(self.chunk_size)

    def extra_repr(self) -> str:
        settings = "heads", "kv_heads", "dim_head", "causal", "dropout", "chunk_size", "mixed_precision", "backend"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)


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
    """A `FlashAttention` with copies of the weights of `mha`, its dropout, device, dtype and training mode, and so its outputs.

    What is called otherwise:
        The layer takes and returns (B, N, dim). Of an `mha` with batch_first=False, which has (N, B, dim), transpose both.
        It returns the output alone, not a pair with the attention weights.
        Masks are inverted: `mha` hides where key_padding_mask (B, Nk) or a bool attn_mask (Nq, Nk) is True, the layer attends where mask
        is True. `mask=~key_padding_mask`; `mask=~attn_mask[None, None]`; `mask=~(key_padding_mask[:, None, None] | attn_mask)` for both;
        `mask=~attn_mask.unflatten(0, (B, heads))` for one of shape (B · heads, Nq, Nk).
        Where `mha` gives NaN, for a row that may attend nothing, the layer gives `to_out`'s bias.

    `causal`, `backend` and `mixed_precision` of the result are plain attributes, which may be set.

    Raises:
        TypeError: `mha` is not a torch.nn.MultiheadAttention.
        NotImplementedError: `mha` has add_bias_kv or add_zero_attn, which add keys that no projection gives.
        ValueError: its dropout is 1.
    """
    if not isinstance(mha, nn.MultiheadAttention):
        raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
    if mha.bias_k is not None or mha.add_zero_attn:
        raise NotImplementedError(
            f"keys beyond the projected ones are not supported, got add_bias_kv={mha.bias_k is not None}, add_zero_attn={mha.add_zero_attn}"
        )
    projections = "to_q", "to_k", "to_v"
    weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight) if mha.in_proj_weight is None else mha.in_proj_weight.chunk(3)
    state = {f"{name}.weight": weight for name, weight in zip(projections, weights, strict=True)} | {"to_out.weight": mha.out_proj.weight}
    if mha.in_proj_bias is not None:
        state |= {f"{name}.bias": bias for name, bias in zip(projections, mha.in_proj_bias.chunk(3), strict=True)}
        state["to_out.bias"] = mha.out_proj.bias
    layer = FlashAttention(
        mha.embed_dim,
        mha.num_heads,
        mha.head_dim,
        dropout=mha.dropout,
        bias=mha.in_proj_bias is not None,
        key_dim=mha.kdim,
        value_dim=mha.vdim,
    )
    layer.to(mha.out_proj.weight).load_state_dict(state)
    return layer.train(mha.training)


@dataclass(frozen=True)
class Chunks:
    """The reference backend with tiles of `size` × `size`. Registered beside the other backends, it has their gradients and transforms."""

    size: int

    @property
    def name(self) -> str:
        return f"reference in chunks of {self.size}"

    @classmethod
    def register(cls, size: int | None) -> None:
        if size is not None:
            BACKENDS.setdefault(cls(size).name, cls(size))

    def forward(self, *call):
        return reference.forward(*call, block_size=self.size)

    def backward(self, *call):
        return reference.backward(*call, block_size=self.size)

    why_not = staticmethod(reference.why_not)
    second_backward = staticmethod(reference.second_backward)


def _half(device: torch.device) -> torch.dtype:
    lacks_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if lacks_bfloat16 else torch.bfloat16


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_dropout(p: float) -> None:
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), got {p!r}")


def _check_shape(name: str, x: Tensor, *shape: str | int) -> None:
    """`shape`: letters for dimensions of any size, then the size of the last."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != len(shape) or x.shape[-1] != shape[-1]:
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(x.shape)}")
