"""`flash_attention()` in Hugging Face transformers.

python checks/check_transformers.py

The truth is the model on torch's attention in float64, tolerances are the harness's; for a sample of all families it is `eager`, as in
sweep_transformers.py, which runs them all.

One file because its checks share a few tiny models, which take seconds to make.
"""

import copy
import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from harness import Report, expect_error, limit, run_alone
from torch import Tensor

from flash_attention import flash_attention
from flash_attention.cache import KeyValueCache, attend


@pytest.fixture
def calls(monkeypatch, integration) -> list[tuple]:
    """The (q, k, v, mask) shapes of every call that reached `flash_attention()`."""
    seen = []

    def spy(q, k, v, mask=None, **options):
        seen.append((q.shape, k.shape, v.shape, None if mask is None else mask.shape))
        return flash_attention(q, k, v, mask, **options)

    monkeypatch.setattr(integration, "flash_attention", spy)
    return seen


@pytest.fixture
def integration(transformers):
    return importlib.import_module("flash_attention.integrations.hugging_face")


@pytest.fixture
def transformers():
    library = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed (the extra `transformers`)")
    library.logging.set_verbosity_error()
    return library


@pytest.fixture
def tiled(integration) -> str:
    return integration.register()


SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "attn_implementation": "sdpa",
}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def build(transformers, kind: str, **settings) -> torch.nn.Module:
    """A small model with random weights, large enough that attention decides the logits."""
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **settings)).eval()
    name = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}[kind]
    config = getattr(transformers, f"{name}Config")(**DECODER | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def three(model: torch.nn.Module, tiled: str) -> tuple[torch.nn.Module, ...]:
    """The model on torch's attention in float64 and in float32, and on this project's in float32."""
    mine = copy.deepcopy(model)
    mine.set_attn_implementation(tiled)
    return copy.deepcopy(model).double(), model, mine


def prompts(lengths=(13, 6, 1), total: int = 13) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, padded on the left."""
    real = torch.arange(total) >= total - torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 97, (len(lengths), total), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids * real, "attention_mask": real.long()}


@pytest.mark.parametrize("padded", (True, False), ids=("left padding", "no padding"))
@pytest.mark.parametrize("kind", ("llama", "mistral", "bert"))
def check_logits(transformers, tiled, calls, kind, padded):
    """Grouped-query and causal (Llama), with a sliding window (Mistral), and bidirectional (BERT)."""
    settings = {"sliding_window": 5} if kind == "mistral" else {}
    inputs = prompts() if padded else prompts((13, 13))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        truth, torchs, got = (m(**inputs).logits[real] for m in three(build(transformers, kind, **settings), tiled))
    assert len(calls) == 2, f"{len(calls)} of 2 layers reached flash_attention"
    assert all(k[1] == (4 if kind == "bert" else 2) for _, k, _, _ in calls), f"keys were repeated: {calls}"
    assert all(mask == (torch.Size((3, 13)) if padded else None) for *_, mask in calls), f"masks {calls}"
    report = Report(f"{kind}, {'left padding' if padded else 'no padding'}")
    report.compare("logits", "O", got, truth, limit("O", truth, torchs, torch.float32, 16))
    report.verdict()


FAMILIES = {  # with layers whose window is 5
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5, "attn_logit_softcapping": None, "query_pre_attn_scalar": 16},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "Qwen2": {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3": {},
    "Phi3": {"sliding_window": 5, "original_max_position_embeddings": 64, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("batch", ("plain", "left padding", "packed", "pieces"))
@pytest.mark.parametrize("family", FAMILIES)
def check_windows_and_documents(transformers, tiled, calls, family, batch):
    """What `eager` gives, without a mask for each pair of a query and a key: windows, padding, and documents packed in one row."""
    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**DECODER | FAMILIES[family] | {"attn_implementation": "eager"})).eval()
    mine = copy.deepcopy(model)
    mine.set_attn_implementation(tiled)
    inputs, keys = prompts((13, 13)), None
    if batch == "left padding":
        inputs, keys = prompts(), torch.Size((3, 13))
    if batch == "packed":
        position = torch.cat([torch.arange(n) for n in (1, 7, 5)])[None]
        inputs = {"input_ids": prompts((13,))["input_ids"], "position_ids": position}

    def run(model, **inputs):
        if batch != "pieces":
            return model(**inputs, use_cache=False).logits
        cache = transformers.DynamicCache(config=model.config)
        return torch.cat([model(input_ids=x, past_key_values=cache).logits for x in inputs["input_ids"].split([5, 1, 7], dim=1)], dim=1)

    with torch.no_grad():
        want = run(model, **inputs)
        got = run(mine, **inputs)
    real = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape)).bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-5)
    assert calls and all(mask == keys for *_, mask in calls), f"masks {calls}"


def check_documents_by_their_ends(integration):
    """cu_seq_lens_q and cu_seq_lens_k separate documents where no mask does, and are refused where they cannot be obeyed."""
    q, k, v = qkv()
    q, k, v, ends, module = q[:1], k[:1], v[:1], torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.nn.Module()
    both = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    for mask in (None, integration.mask(1, 9, 9)):
        got, _ = integration.attention(module, q, k, v, mask, **both, sliding_window=None)
        want = [flash_attention(*(x[:, :, i] for x in (q, k, v)), causal=True) for i in (slice(0, 4), slice(4, 9))]
        torch.testing.assert_close(got, torch.cat(want, 2).transpose(1, 2), atol=1e-6, rtol=0)
    window = integration.masking_utils.sliding_window_causal_mask_function(3)
    got, _ = integration.attention(module, q, k, v, integration.mask(1, 9, 9, mask_function=window), **both)
    want = [flash_attention(*(x[:, :, i] for x in (q, k, v)), window=(2, 0)) for i in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(got, torch.cat(want, 2).transpose(1, 2), atol=1e-6, rtol=0)
    for wrong in ({"cu_seq_lens_q": ends, "cu_seq_lens_k": torch.tensor([0, 3, 4, 9], dtype=torch.int32)}, {"seq_idx": torch.zeros(1, 9)}):
        with pytest.raises(NotImplementedError, match="seq"):
            integration.attention(module, q, k, v, None, **wrong)


def check_patterns_are_what_is_written_out(integration):
    """Known mask functions against transformers' own `sdpa_mask`; an unknown one is materialised as a tensor."""
    utils = integration.masking_utils
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    documents = utils.find_packed_sequence_indices(position)

    def packed(function):
        if hasattr(utils, "packed_sequence_compatibility_function"):
            return utils.packed_sequence_compatibility_function(function, position, documents)
        return utils.and_masks(utils.packed_sequence_mask_function(documents), function)  # as older versions of transformers write it

    functions = {
        "causal": utils.causal_mask_function,
        "all": utils.bidirectional_mask_function,
        "window": utils.sliding_window_causal_mask_function(3),
        "both sides": utils.sliding_window_bidirectional_mask_function(2),
        "packed": packed(utils.causal_mask_function),
        "packed window": packed(utils.sliding_window_causal_mask_function(3)),
    }
    real = torch.arange(9) >= torch.tensor([[3], [0]])
    for name, function in functions.items():
        for padding in (None, real):
            for Nq, q_offset in ((9, 0), (4, 5), (1, 8)) if "packed" not in name else ((9, 0),):
                given = {"mask_function": function, "attention_mask": padding, "q_offset": q_offset, "allow_is_causal_skip": False}
                got, want = integration.mask(2, Nq, 9, **given), utils.sdpa_mask(2, Nq, 9, **given)
                assert isinstance(got, integration.ImpliedMask) and got.written is None
                assert torch.equal(got & True, want), f"{name}, {Nq} queries"
                q, k, v = qkv()
                O, _ = integration.attention(torch.nn.Module(), q[:, :, -Nq:], k, v, integration.mask(2, Nq, 9, **given))
                expected = flash_attention(q[:, :, -Nq:], k, v, want).transpose(1, 2)
                torch.testing.assert_close(O, expected, atol=1e-6, rtol=0, msg=f"{name}, {Nq} queries")
    own = integration.mask(1, 9, 9, mask_function=lambda b, h, i, j: (i + j) % 2 == 0, allow_is_causal_skip=False)
    assert not isinstance(own, integration.ImpliedMask) and own[0, 0, 0, :2].tolist() == [True, False]


@pytest.mark.parametrize("batch", ("plain", "left padding", "generate"))
@pytest.mark.parametrize("kind", ("bloom", "mpt", "mpt, 6 heads, scaled, clipped"))
def check_alibi_models(transformers, integration, calls, kind, batch):
    """Bloom and MPT, whose layers do not use AttentionInterface: outputs and gradients match `eager`, and no Nq × Nk mask is made."""
    use_tiled_attention = importlib.import_module("flash_attention.integrations.hugging_face_alibi").use_tiled_attention
    torch.manual_seed(0)
    shared = {"vocab_size": 97, "initializer_range": 0.2}
    if kind == "bloom":
        config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, **shared)
        eager = transformers.BloomForCausalLM(config).eval()
    else:
        special = "heads" in kind
        own = {"softmax_scale": 0.3, "clip_qkv": 1.0} if special else {}
        sizes = {"d_model": 96, "n_heads": 6} if special else {"d_model": 64, "n_heads": 4}
        config = transformers.MptConfig(n_layers=2, max_seq_len=64, attn_config={"attn_pdrop": 0} | own, **sizes, **shared)
        eager = transformers.MptForCausalLM(config).eval()
    mine = use_tiled_attention(copy.deepcopy(eager))
    inputs = prompts((13, 13) if batch == "plain" else (13, 6, 4))
    if batch == "generate":
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(mine.generate(**inputs, **options), eager.generate(**inputs, **options))
        return
    real = inputs["attention_mask"].bool()
    got, want = (model(**inputs).logits[real] for model in (mine, eager))
    assert [mask for *_, mask in calls] == [None if batch == "plain" else torch.Size((3, 13))] * 2
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    gradients = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x, model in ((got, mine), (want, eager))]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)
    expect_error(lambda: use_tiled_attention(torch.nn.Linear(2, 2)), ValueError, ["Linear"])


def check_cached_pieces(transformers, tiled, calls):
    """A prompt in pieces of 5, 1 and 7 tokens through a KV cache: later pieces have more keys than queries, aligned bottom-right."""
    ids = prompts((13, 13))["input_ids"]

    def in_pieces(model):
        cache = transformers.DynamicCache(config=model.config)
        return torch.cat([model(input_ids=piece, past_key_values=cache).logits for piece in ids.split([5, 1, 7], dim=1)], dim=1)

    with torch.no_grad():
        truth, torchs, got = (in_pieces(m) for m in three(build(transformers, "llama"), tiled))
    assert [(q[2], k[2]) for q, k, _, _ in calls[::2]] == [(5, 5), (1, 6), (7, 13)]
    report = Report("llama, a prompt in pieces")
    report.compare("logits", "O", got, truth, limit("O", truth, torchs, torch.float32, 16))
    report.verdict()


@pytest.mark.parametrize("padded", (True, False), ids=("left padding", "no padding"))
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def check_generate(transformers, tiled, calls, cache, padded):
    """Greedy decoding gives the tokens that it gives on torch's attention."""
    inputs = prompts() if padded else prompts((13, 13))
    settings = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": cache}
    truth, torchs, got = (m.generate(**inputs, **settings) for m in three(build(transformers, "llama"), tiled))
    assert torch.equal(truth, torchs), "torch's own attention gives other tokens in float32 than in float64: choose another seed"
    assert torch.equal(got, truth), f"tokens differ\n{got}\n{truth}"
    assert {q[2] for q, *_ in calls} == {13, 1} and len(calls) == 2 * 16  # one pass over the prompt, then one token at a time
    assert got[:, 13:].unique().numel() > 8, "hardly any variety: these tokens would not show a mistake"


@pytest.mark.parametrize("padded", (True, False), ids=("left padding", "no padding"))
@pytest.mark.parametrize("cache", ("dynamic", "static", None, 16), ids=lambda x: f"pages of {x}" if x == 16 else x or "contiguous")
def check_generate_in_float64(transformers, tiled, cache, padded):
    """Token for token what `eager` gives, from transformers' caches and from this project's, which its own attention reads in place.

    With padding what `sdpa` gives: eager adds float64's lowest number to scores, and rows of padding overflow into NaN.
    """
    inputs = prompts() if padded else prompts((13, 13))
    torchs = build(transformers, "llama", attn_implementation="sdpa" if padded else "eager").double()
    mine = copy.deepcopy(torchs)
    with torch.no_grad():
        truth = torchs.generate(**inputs, max_new_tokens=24, do_sample=False)
        if isinstance(cache, str):
            mine.set_attn_implementation(tiled)
            got = mine.generate(**inputs, max_new_tokens=24, do_sample=False, cache_implementation=cache)
        else:
            got = _generate(transformers, mine, inputs["input_ids"], inputs["attention_mask"], 24, cache)
    assert torch.equal(got, truth), f"tokens differ\n{got}\n{truth}"
    assert got[:, 13:].unique().numel() > 8, "hardly any variety: these tokens would not show a mistake"


def _generate(transformers, model, ids, real, count: int, page_size: int | None) -> torch.Tensor:
    """Greedy decoding from a KeyValueCache: each layer appends the new tokens' keys and values, then attends."""
    cache = KeyValueCache(2, ids.shape[0], 2, 16, 13 + count, dtype=torch.float64, page_size=page_size)
    cache.pad_left((real == 0).sum(1))

    def attention(module, query, key, value, mask, scaling=None, **_):
        cache[module.layer_idx].append(key, value)
        return attend(query, cache[module.layer_idx], scale=scaling).transpose(1, 2), None

    transformers.AttentionInterface.register("from_a_cache", attention)
    transformers.AttentionMaskInterface.register("from_a_cache", lambda *_, **__: None)
    model.set_attn_implementation("from_a_cache")
    positions, new = (real.cumsum(1) - 1).clamp(min=0), ids
    for _ in range(count):
        new = model(input_ids=new, position_ids=positions, use_cache=False).logits[:, -1:].argmax(-1)
        ids, positions = torch.cat((ids, new), 1), positions[:, -1:] + 1
    assert cache[1].lengths.tolist() == [12 + count] * ids.shape[0]
    return ids


@pytest.mark.parametrize("padded", (True, False), ids=("left padding", "no padding"))
@pytest.mark.parametrize("kind", ("llama", "bert"))
def check_training_gradients(transformers, tiled, calls, kind, padded):
    """The gradient of the loss with respect to every parameter, with grouped key/value heads (Llama) and without (BERT)."""
    inputs = prompts() if padded else prompts((13, 13))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = three(build(transformers, kind), tiled)  # in eval mode: BERT has dropout outside attention
    for model in models:
        model(**inputs, labels=labels).loss.backward()
    assert len(calls) == 2
    report = Report(f"{kind}, gradients of the loss")
    for (name, truth), torchs, got in zip(models[0].named_parameters(), *(m.parameters() for m in models[1:]), strict=True):
        allowed = limit("dQ", truth.grad, torchs.grad, torch.float32, 16)
        report.compare("loss", "gradient", got.grad, truth.grad, allowed, name)
    report.verdict()


def check_dropout(integration):
    """The attention dropout of a model is `flash_attention()`'s."""
    q, k, v = torch.randn(2, 4, 9, 16), *torch.randn(2, 2, 2, 9, 16)
    torch.manual_seed(1)
    want = flash_attention(q, k, v, causal=True, scale=0.3, dropout_p=0.25).transpose(1, 2)
    torch.manual_seed(1)
    got, weights = integration.attention(torch.nn.Module(), q, k, v, None, dropout=0.25, scaling=0.3)
    assert torch.equal(got, want) and got.is_contiguous() and weights is None


def qkv(Nq: int = 9, Nk: int = 9) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, Nq, 16), *torch.randn(2, 2, 2, Nk, 16)


def check_refusals(transformers, tiled, integration):
    """Nothing that changes the result is silently ignored: a keyword with an effect, an unknown keyword, an integer mask, a bad name."""
    q, k, v = qkv()
    for keyword in ({"sinks": torch.zeros(4)}, {"block_indices": torch.zeros(2, 4, 9, 1)}, {"made_up": 3}):
        with pytest.raises(NotImplementedError, match=f"Module passes {next(iter(keyword))}"):
            integration.attention(torch.nn.Module(), q, k, v, None, **keyword)
    documents = {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "cu_seq_lens_k": torch.tensor([0, 4, 9]), "max_length_q": 5}
    for apart in (None, integration.mask(2, 9, 9)):
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q, cu_seq_lens_k, which"):
            integration.attention(torch.nn.Module(), q, k, v, apart, **documents)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    want, _ = integration.attention(torch.nn.Module(), q, k, v, None)
    got, _ = integration.attention(torch.nn.Module(), q, k, v, mask, **documents, softcap=None, made_up=False)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    with pytest.raises(TypeError, match=r"bool.*torch\.int64"):
        integration.attention(torch.nn.Module(), q, k, v, mask.long())
    with pytest.raises(ValueError, match="flash"):
        integration.register("flash_tiles")


def check_output_attentions(transformers, tiled, caplog):
    """One warning, and attention without weights, as with transformers' own `sdpa`."""
    model = build(transformers, "llama")
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.warning_once.cache_clear()
    results = []
    for name in ("sdpa", tiled):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(model(**prompts(), output_attentions=True))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("flash_attention")]
    assert len(said) == 1 and "eager" in said[0], said
    assert results[1].attentions is None or results[1].attentions == results[0].attentions
    real = prompts()["attention_mask"].bool()
    torch.testing.assert_close(results[1].logits[real], results[0].logits[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", (None, "bool", "float"))
@pytest.mark.parametrize("biased", (False, True))
def check_added_to_scores(transformers, integration, calls, biased, masked):
    """Float masks and position biases, with gradients, as transformers' own `sdpa`, whose causality is the same where Nq = Nk."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = qkv()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = {None: None, "bool": torch.rand(2, 1, 9, 9) < 0.6, "float": torch.randn(2, 1, 9, 9)}[masked]
    bias = torch.randn(1, 4, 9, 9, requires_grad=True) if biased else None
    results = []
    for attention in (sdpa_attention_forward, integration.attention):
        O, weights = attention(module, q, k, v, mask, position_bias=bias, scaling=0.3)
        results.append((O, *(torch.autograd.grad(O.square().sum(), bias) if biased else ())))
        assert weights is None
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert calls


@pytest.mark.parametrize("masked", (None, "bool", "float"))
@pytest.mark.parametrize("biased", (False, True))
def check_alignment_and_indices(integration, masked, biased):
    """The last three queries alone get what they get among all: aligned bottom-right, with a bias, and among chosen keys too."""
    q, k, v = qkv()
    mask = {None: None, "bool": torch.rand(2, 1, 9, 9) < 0.8, "float": torch.randn(2, 1, 9, 9)}[masked]
    bias = torch.randn(2, 4, 9, 9) if biased else None
    indices = torch.rand(2, 9, 9).topk(6).indices.int()
    indices[:, :, 0] = torch.arange(9)  # otherwise a causal row may see nothing
    chosen = torch.zeros(2, 1, 9, 9, dtype=torch.bool).scatter_(3, indices[:, None].long(), True)
    scores = q @ k.repeat_interleave(2, dim=1).mT / 4 + (0 if bias is None else bias)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if mask is None else mask if masked == "bool" else torch.ones(9, 9, dtype=torch.bool)
    for these, allowed in ((None, seen), (indices, seen & chosen)):
        with_mask = scores + (mask if masked == "float" else 0)
        P = with_mask.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
        want = (P @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
        for rows in (slice(0, 9), slice(6, 9), slice(8, 9)):
            row = {
                "attention_mask": None if mask is None else mask[:, :, rows],
                "position_bias": None if bias is None else bias[:, :, rows],
                "indices": None if these is None else these[:, rows],
            }
            got, _ = integration.attention(torch.nn.Module(), q[:, :, rows], k, v, **row)
            some = allowed.expand(2, 1, 9, 9).any(-1)[:, 0, rows]  # finite masks, added to every score of a row, have no effect
            torch.testing.assert_close(got[some], want[:, rows][some], atol=2e-6, rtol=1e-5)


def check_implied_mask(integration):
    """A causal mask takes no memory until an operation reads it; then it is a real mask, and changes to it count."""
    huge = integration.mask(1, 1 << 20, 1 << 20)  # 1 TB if it were in memory
    assert huge.shape == (1, 1, 1 << 20, 1 << 20) and huge.dtype == torch.bool and huge.written is None
    elsewhere = huge.to("meta")
    assert elsewhere.device.type == "meta" and elsewhere.pattern.right == 0 and elsewhere.written is None
    tril = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    assert integration.mask(1, 9, 9).to(torch.float32).dtype == torch.float32
    assert torch.equal(integration.mask(1, 9, 9)[:, :, -3:], tril[:, :, -3:])
    assert torch.equal(~integration.mask(1, 9, 9), ~tril) and torch.equal(integration.mask(1, 9, 9) & tril.mT, tril & tril.mT)
    assert torch.equal(integration.mask(2, 9, 12).any(2)[1, 0], torch.arange(12) < 9)  # the last of a static cache are not written yet
    everything = integration.masking_utils.bidirectional_mask_function
    full = integration.mask(1, 9, 9, mask_function=everything, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    q, k, v = qkv()
    seen, module = integration.mask(1, 9, 9), torch.nn.Module()
    module.is_causal = False  # the mask decides, not the module
    want = flash_attention(q, k, v, causal=True).transpose(1, 2)
    assert torch.equal(integration.attention(module, q, k, v, seen)[0], want)
    longer = [torch.cat((x, torch.full((2, 2, 5, 16), torch.nan)), dim=2) for x in (k, v)]
    assert torch.equal(integration.attention(module, q, *longer, integration.mask(1, 9, 14))[0], want)
    assert torch.equal(integration.attention(torch.nn.Module(), q, k, v, full)[0], flash_attention(q, k, v).transpose(1, 2))
    seen[:, :, 4:, 2] = False
    without = tril.clone()
    without[:, :, 4:, 2] = False
    assert torch.equal(integration.attention(module, q, k, v, seen)[0], flash_attention(q, k, v, without).transpose(1, 2))


def check_compiled(transformers, tiled):
    """The whole model in one graph, and a layer compiled, with the mask made outside."""
    model = build(transformers, "llama", num_hidden_layers=1)
    inputs = prompts((13, 13))
    with torch.no_grad():
        want = model(**inputs).logits
        model.set_attn_implementation(tiled)
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
        model.model.layers[0].compile(backend="aot_eager", fullgraph=True)
        pieces = model(**inputs).logits
    torch.testing.assert_close(whole, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(pieces, want, atol=1e-4, rtol=0)


SERVED = [
    *("llama", "mistral", "gemma3_text", "gemma4_text", "qwen2_vl", "gpt2", "llama4_text", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"),
    *("gemma2", "gpt_oss"),
    *("jamba", "lfm2", "bert", "modernbert", "bart", "t5", "whisper", "wav2vec2", "vit", "swin", "clip", "aimv2", "beit"),
]
REFUSED = {"git": "mask", "deepseek_v4": "mask", "bigbird_pegasus": "mask", "minimax_m3_vl_text": "block_indices"}


@pytest.fixture
def sweep(transformers):
    """The script, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("sweep_transformers")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()


def pinned() -> str:
    """The version of transformers that requirements.txt installs."""
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    return next(line.removeprefix("transformers==") for line in lines if line.startswith("transformers=="))


@pytest.mark.parametrize("kind", [*SERVED, *REFUSED])
def check_families(sweep, kind):
    """A sample of the sweep."""
    report = sweep.examine(kind, sweep.families()[kind])
    lines = "\n".join(sweep.lines(kind, report))
    assert not sweep.failures(report), lines
    if "no layer reached" in report.get("reason", "") and importlib.metadata.version("transformers") != pinned():
        pytest.skip(f"this transformers computes {kind}'s attention itself")
    if kind in REFUSED:
        assert report["reason"].startswith("refused") and REFUSED[kind] in report["reason"], lines
    else:
        assert all(isinstance(report["runs"][what], float) for what in ("outputs", "gradients")), lines


def check_sweep_sees_mistakes(sweep, integration, monkeypatch):
    """With transformers' own masks, where None has three different meanings, the sweep fails."""
    from transformers.masking_utils import sdpa_mask

    monkeypatch.setattr(integration, "mask", sdpa_mask)
    for kind, what in (("aimv2", "outputs"), ("gemma4_text", "generate, static")):
        report = sweep.examine(kind, sweep.families()[kind])
        assert what in sweep.failures(report), sweep.lines(kind, report)


def check_without_transformers(monkeypatch):
    """Without the library: an ImportError that names the extra; the rest of the package imports."""
    name = "flash_attention.integrations.hugging_face"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python then says that there is no such module
    with pytest.raises(ImportError, match=r"\[transformers\]"):
        importlib.import_module(name)


if __name__ == "__main__":
    run_alone(__file__)
