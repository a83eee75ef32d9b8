"""The calls of two earlier modules named FlashAttention, for code in which nothing but the import changes.

`ChunkedFlashAttention(embed_size, heads, chunk_size)(values, keys, queries, mask=None)`, and the official package's first interface,
`PackedFlashAttention(softmax_scale, attention_dropout)(qkv, key_padding_mask=None, causal=False)`. The interfaces are theirs and what is
computed is attention: the original of the first attended over the batch axis, without a scale, and only within chunks.
"""

import torch
from torch import Tensor, nn

from flash_attention.interface import flash_attention
from flash_attention.layers import FlashAttention

RENAMED = {"queries": "to_q", "keys": "to_k", "values": "to_v", "fc_out": "to_out"}  # the chunked module's projections


class ChunkedFlashAttention(FlashAttention):
    """`FlashAttention` with the arguments of the chunked module.

    Args:
        embed_size: width of the input and of the output.
        heads: which divide embed_size.
        chunk_size: the layer's block_size: rows and columns of a tile of scores. The layer then runs the reference, on any device; set
            `block_size = None` for the fastest backend.
        settings: others of `FlashAttention`, such as causal and dropout. The projections have a bias unless bias=False.

    Its state_dict is that of `FlashAttention`; one with the names queries, keys, values and fc_out loads too.

    Raises:
        ValueError: heads does not divide embed_size, and as `FlashAttention`.

    >>> layer = ChunkedFlashAttention(256, 8, 16)
    >>> layer(*torch.randn(3, 2, 100, 256)).shape
    torch.Size([2, 100, 256])
    """

    def __init__(self, embed_size: int, heads: int, chunk_size: int | None = None, **settings):
        if not isinstance(heads, int) or heads < 1 or embed_size % heads:
            raise ValueError(f"heads must divide embed_size, got heads {heads!r} and embed_size {embed_size!r}")
        super().__init__(embed_size, heads, **{"dim_head": embed_size // heads, "block_size": chunk_size, "bias": True, **settings})

    def forward(self, values: Tensor, keys: Tensor, queries: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """values and keys (B, Nk, embed_size), queries (B, Nq, embed_size) → (B, Nq, embed_size). mask: as in `FlashAttention`."""
        return super().forward(queries, keys, mask, value=values)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            projection, _, kind = name.removeprefix(prefix).partition(".")
            if projection in RENAMED:
                state_dict[f"{prefix}{RENAMED[projection]}.{kind}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class PackedFlashAttention(nn.Module):
    """Self-attention of packed queries, keys and values, with the interface of `flash_attn.flash_attention.FlashAttention` (flash-attn 0.1
    and 0.2). It has no parameters; device and dtype are taken and change nothing.

    Args:
        softmax_scale: 1/√D unless given.
        attention_dropout: probability of dropping an attention weight, in training mode only.

    Raises:
        ValueError: attention_dropout is not in [0, 1).

    >>> attend = PackedFlashAttention(attention_dropout=0.1)
    >>> attend(torch.randn(2, 100, 3, 8, 64), causal=True)[0].shape
    torch.Size([2, 100, 8, 64])
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0, device=None, dtype=None):
        super().__init__()
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be a probability in [0, 1), got {attention_dropout!r}")
        self.softmax_scale, self.dropout_p = softmax_scale, attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
        *,
        attn_mask: None = None,
    ) -> tuple[Tensor, None]:
        """qkv (B, S, 3, H, D) → (B, S, H, D) and None, in place of attention weights.

        key_padding_mask: bool (B, S), True = a token, False = padding, where the output is 0.
        cu_seqlens: int (B + 1,), where sequences packed one after another begin and end: qkv (tokens, 3, H, D) → (tokens, H, D). max_s,
        the longest of them, is worked out unless given.

        Raises:
            TypeError: the mask is not bool. ValueError: shapes do not fit.
            NotImplementedError: attn_mask or need_weights is given, which the original refuses too.
        """
        if attn_mask is not None or need_weights:
            raise NotImplementedError("attn_mask and need_weights are not supported; flash_attention(q, k, v, mask) takes any mask")
        if cu_seqlens is not None:
            return self._packed_sequences(qkv, key_padding_mask, causal, cu_seqlens, max_s), None
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(f"qkv must have shape (B, S, 3, H, D), got {tuple(qkv.shape)}")
        if key_padding_mask is not None and key_padding_mask.shape != qkv.shape[:2]:
            raise ValueError(f"key_padding_mask must have shape (B, S) = {tuple(qkv.shape[:2])}, got {tuple(key_padding_mask.shape)}")
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each, views
        dropout_p = self.dropout_p if self.training else 0.0
        O = flash_attention(q, k, v, key_padding_mask, causal=causal, scale=self.softmax_scale, dropout_p=dropout_p)
        O = O.transpose(1, 2)  # type: ignore[union-attr]
        return O if key_padding_mask is None else O.masked_fill(~key_padding_mask[:, :, None, None], 0), None

    def _packed_sequences(self, qkv, key_padding_mask, causal, cu_seqlens, max_s) -> Tensor:
        if key_padding_mask is not None:
            raise ValueError("sequences packed one after another have no padding: cu_seqlens and key_padding_mask do not go together")
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(f"with cu_seqlens, qkv must have shape (tokens, 3, H, D), got {tuple(qkv.shape)}")
        lengths = cu_seqlens.diff()
        keep = torch.arange(max_s or int(lengths.max()), device=qkv.device) < lengths[:, None]  # (B, S)
        if cu_seqlens[0] != 0 or int(keep.sum()) != len(qkv) or cu_seqlens[-1] != len(qkv):
            got = f"{cu_seqlens.tolist()} and max_s {max_s}"
            raise ValueError(f"cu_seqlens must rise from 0 to {len(qkv)} tokens in steps of up to max_s, got {got}")
        padded = qkv.new_zeros(*keep.shape, *qkv.shape[1:]).index_put((keep,), qkv)  # (B, S, 3, H, D)
        return self(padded, keep, causal)[0][keep]

    def extra_repr(self) -> str:
        return f"softmax_scale={self.softmax_scale}, attention_dropout={self.dropout_p}"
