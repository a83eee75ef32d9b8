"""`from_multihead_attention`: a torch.nn.MultiheadAttention becomes the layer with the same outputs and gradients, or is refused by name.

python checks/check_multihead.py [--backend reference]
"""

import copy

import pytest
import torch
from check_layers import DIM_HEAD, HEADS, KEYS, NK, NQ, B, against, coins, random, randomise, solve, with_mask
from harness import (
    Report,
    Target,
    dtype_served,
    run_alone,
    skip_unless_masks,
    skip_unless_served,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from flash_attention import from_multihead_attention


def mha_masks(target: Target) -> dict[str, dict[str, Tensor]]:
    """Name → the module's two masks, True = hidden. Column 0 stays visible, because the module gives NaN for a row without columns."""
    padding, full = ~coins(target, B, NK), ~coins(target, B * HEADS, NQ, NK)
    padding[:, 0], full[..., 0] = False, False
    return {
        "no mask": {},
        "key_padding_mask": {"key_padding_mask": padding},
        "attn_mask": {"attn_mask": full[0]},
        "attn_mask of heads": {"attn_mask": full},
        "both": {"key_padding_mask": padding, "attn_mask": full[0]},
    }


def converted_mask(key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor | None:
    """Inverts masks as the docstring of from_multihead_attention says."""
    if attn_mask is None:
        return None if key_padding_mask is None else ~key_padding_mask
    if attn_mask.dim() == 3:
        return ~attn_mask.unflatten(0, (B, HEADS))
    return ~attn_mask[None, None] if key_padding_mask is None else ~(key_padding_mask[:, None, None] | attn_mask)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("settings", ({}, {"bias": False}, {"kdim": 40}, {"kdim": 40, "vdim": 8, "bias": False}), ids=str)
def check_conversion(target, batch_first, settings):
    """The converted layer has the module's outputs and gradients, with each of its masks inverted."""
    skip_unless_masks(target)
    dim, dtype = HEADS * DIM_HEAD, dtype_served(target)
    probe = torch.empty(B, HEADS, NQ, DIM_HEAD, dtype=dtype, device=target.device)
    skip_unless_served(target, probe, probe, probe, None, False, 0.0)
    mha = randomise(nn.MultiheadAttention(dim, HEADS, batch_first=batch_first, **settings)).to(target.device, dtype)
    layer = from_multihead_attention(mha)
    layer.backend = target.backend
    widths = dim, settings.get("kdim", dim), settings.get("vdim", dim)
    streams = tuple(random(target, B, n, d, seed=d) for n, d in zip((NQ, NK, NK), widths, strict=True))

    def module(mha, masks):
        def call(*streams):
            swap = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
            return swap(mha(*map(swap, streams), need_weights=False, **masks)[0])

        return by_projection(solve(mha, call, tuple(x.to(mha.out_proj.weight.dtype) for x in streams)))

    report = Report(f"{target}: converted from torch.nn.MultiheadAttention")
    for what, masks in mha_masks(target).items():
        got = solve(layer, with_mask(layer, converted_mask(**masks)), streams)
        truth, in_dtype = module(copy.deepcopy(mha).double(), masks), module(mha, masks)
        against(report, what, {name: got[name] for name in truth}, truth, in_dtype)
        assert set(got) == set(truth)
    report.verdict()


def by_projection(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a MultiheadAttention's parameters under the layer's names."""
    names = {"q_proj_weight": "to_q.weight", "k_proj_weight": "to_k.weight", "v_proj_weight": "to_v.weight"}
    names |= {"out_proj.weight": "to_out.weight", "out_proj.bias": "to_out.bias"}
    renamed = {}
    for name, x in answer.items():
        if name.startswith("in_proj_"):
            renamed |= {f"to_{letter}.{name.removeprefix('in_proj_')}": part for letter, part in zip("qkv", x.chunk(3), strict=True)}
        else:
            renamed[names.get(name, name)] = x
    return renamed


def check_conversion_settings():
    """Dropout, mode and dtype come along; the weights are copies; what cannot be converted is refused."""
    mha = nn.MultiheadAttention(32, 4, dropout=0.25, dtype=torch.bfloat16).eval()
    layer = from_multihead_attention(mha)
    assert layer.dropout == 0.25
    assert not layer.training
    assert not any(module.training for module in layer.modules())
    assert from_multihead_attention(mha.train()).training
    assert {x.dtype for x in layer.parameters()} == {torch.bfloat16}
    assert all(x.is_leaf and x.requires_grad for x in layer.parameters())
    assert not {x.data_ptr() for x in layer.parameters()} & {x.data_ptr() for x in mha.parameters()}
    with torch.no_grad():
        mha.in_proj_weight.zero_()
        mha.out_proj.weight.zero_()
    assert all(layer.state_dict()[name].any() for name in KEYS)
    for setting in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match=f"{setting}=True"):
            from_multihead_attention(nn.MultiheadAttention(32, 4, **{setting: True}))
    with pytest.raises(TypeError, match=r"MultiheadAttention, got Linear"):
        from_multihead_attention(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"dropout.*1\.0"):
        from_multihead_attention(nn.MultiheadAttention(32, 4, dropout=1.0))


@pytest.mark.parametrize("settings", ({}, {"bias": False}, {"kdim": 40, "vdim": 8}), ids=str)
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
def check_conversion_keeps(settings, grad):
    """Each parameter's requires_grad, dtype and device come along, one by one, and torch's generator is left alone. What was frozen gets no
    gradient and the rest gets its own."""
    frozen = nn.MultiheadAttention(32, 4, **settings)
    for name, _ in frozen.named_parameters():
        mha = copy.deepcopy(frozen)
        mha.get_parameter(name).requires_grad_(False)
        before = torch.get_rng_state()
        with torch.set_grad_enabled(grad):
            layer = from_multihead_attention(mha)
        assert torch.equal(torch.get_rng_state(), before)
        expected = {copy for copy in layer.state_dict() if copy in by_projection({name: torch.empty(96)})}
        assert expected and {name for name, x in layer.named_parameters() if not x.requires_grad} == expected
        widths = 32, settings.get("kdim", 32), settings.get("vdim", 32)
        query, key, value = (torch.randn(2, 5, n) for n in widths)
        layer(query, key, value=value).square().sum().backward()
        assert {name for name, x in layer.named_parameters() if x.grad is None} == expected

    mixed = frozen.to("meta")
    mixed.out_proj.to(torch.bfloat16)
    layer = from_multihead_attention(mixed)
    assert {name: (x.dtype, x.device.type) for name, x in layer.named_parameters()} == {
        name: (torch.bfloat16 if "to_out" in name else torch.float32, "meta") for name in layer.state_dict()
    }


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Subclass(nn.MultiheadAttention):
    def forward(self, *streams, **settings):
        O, weights = super().forward(*streams, **settings)
        return 2 * O, weights


def prepared(prepare) -> nn.MultiheadAttention:
    mha = nn.MultiheadAttention(32, 4)
    prepare(mha)
    return mha


# Modules that cannot be converted by copying parameters → how to make one, and what the message must name.
LOST = {
    "parametrized": (lambda mha: parametrize.register_parametrization(mha, "in_proj_weight", Doubled()), "in_proj_weight"),
    "output parametrized": (lambda mha: parametrize.register_parametrization(mha.out_proj, "weight", Doubled()), "out_proj.weight"),
    "pruned": (lambda mha: prune.l1_unstructured(mha, "in_proj_weight", 0.5), "in_proj_weight"),
    "forward hook": (lambda mha: mha.register_forward_hook(lambda *_: None), "hooks.*the module"),
    "hook before the forward": (lambda mha: mha.register_forward_pre_hook(lambda *_: None), "hooks.*the module"),
    "backward hook": (lambda mha: mha.register_full_backward_hook(lambda *_: None), "hooks.*the module"),
    "hook before the backward": (lambda mha: mha.register_full_backward_pre_hook(lambda *_: None), "hooks.*the module"),
    "gradient hook": (lambda mha: mha.in_proj_bias.register_hook(lambda g: 0 * g), "hooks.*in_proj_bias"),
    "hook after a gradient": (lambda mha: mha.out_proj.weight.register_post_accumulate_grad_hook(print), r"hooks.*out_proj\.weight"),
}


@pytest.mark.parametrize(("prepare", "words"), LOST.values(), ids=LOST)
def check_conversion_refuses(prepare, words):
    """Modules that copied parameters would not reproduce are refused, not silently changed."""
    with pytest.raises(NotImplementedError, match=words):
        from_multihead_attention(prepared(prepare))


def check_conversion_of_subclasses():
    """A subclass with its own forward is refused; one that only adds methods is not."""
    with pytest.raises(NotImplementedError, match=r"Subclass.*forward"):
        from_multihead_attention(Subclass(32, 4))
    x = torch.randn(2, 5, 32)
    mha = type("Named", (nn.MultiheadAttention,), {})(32, 4, batch_first=True)
    torch.testing.assert_close(from_multihead_attention(mha)(x), mha(x, x, x)[0])


if __name__ == "__main__":
    run_alone(__file__)
