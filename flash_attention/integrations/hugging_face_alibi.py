"""Bloom and MPT, whose ALiBi attention transformers computes inside their layers, past its `AttentionInterface`.

    from flash_attention.integrations.hugging_face_alibi import use_tiled_attention

    model = use_tiled_attention(AutoModelForCausalLM.from_pretrained("bigscience/bloom-560m"))

Both add slope · column to the scores, which by the softmax's invariance is ALiBi's distance (Press et al. 2021, arXiv:2108.12409): a bias
of one row, (B or 1, H, 1, Nk). Causality and padding are not materialised, so nothing of size Nq · Nk is in memory.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.mpt.modeling_mpt import MptAttention

from flash_attention.integrations.hugging_face import attention, register


def use_tiled_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model, changed in place: its attention layers call `flash_attention()`; weights and everything else stay as they are.

    Raises:
        ValueError: no layer of it is a BloomAttention or MptAttention. Models that use `AttentionInterface` need `register` alone.
        NotImplementedError: a Bloom that was trained with slow_but_exact tensor parallelism.
    """
    found = [module for module in model.modules() if type(module) in TILED]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer of Bloom's or MPT's; other models take attn_implementation=register()")
    for module in found:
        if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
            raise NotImplementedError("slow_but_exact multiplies the slices of pretraining_tp one by one, which is not computed here")
    name = register()
    for module in model.modules():  # nested models have their own configs
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name  # so that their masks are not materialised
    for module in found:
        module.__class__ = TILED[type(module)]
    return model


class TiledBloomAttention(BloomAttention):
    """Bloom's layer. There are no attention weights to return: None."""

    def forward(
        self,
        hidden_states: Tensor,  # (B, Nq, H · D)
        residual: Tensor,
        alibi: Tensor,  # (B · H, 1, Nk): slope · column
        attention_mask: Tensor | None,
        layer_past=None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **others,
    ) -> tuple[Tensor, None]:
        B = hidden_states.shape[0]
        q, k, v = self._reshape(self.query_key_value(hidden_states))  # (B, H, Nq, D) each
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias = alibi.view(B, self.num_heads, 1, -1)
        dropout = self.attention_dropout.p if self.training else 0.0
        options = {"scaling": self.inv_norm_factor, "position_bias": bias, "output_attentions": output_attentions}
        O, _ = attention(self, q, k, v, attention_mask, dropout, **options)  # (B, Nq, H, D)
        return dropout_add(self.dense(O.flatten(2)), residual, self.hidden_dropout, self.training), None


class TiledMptAttention(MptAttention):
    """MPT's layer. There are no attention weights to return: None."""

    def forward(
        self,
        hidden_states: Tensor,  # (B, Nq, H · D)
        position_bias: Tensor | None,  # (H, 1, most columns): of the last column 0
        past_key_values=None,
        attention_mask: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = (x.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        bias = None
        if position_bias is not None:
            if position_bias.dim() != 3:
                raise ValueError(f"position_bias must have 3 dimensions, got shape {tuple(position_bias.shape)}")
            Nk = k.shape[2]
            bias = position_bias[None, :, -1:, max(0, position_bias.shape[2] - Nk) :].to(q.dtype)
        dropout = self.attn_dropout_p if self.training else 0.0
        options = {"scaling": self.softmax_scale, "position_bias": bias, "output_attentions": others.get("output_attentions")}
        O, _ = attention(self, q, k, v, attention_mask, dropout, **options)
        return self.out_proj(O.flatten(2)), None


TILED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {BloomAttention: TiledBloomAttention, MptAttention: TiledMptAttention}
