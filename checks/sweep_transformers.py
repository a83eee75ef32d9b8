"""Every model family of the installed transformers, tiny and with random weights: this project's attention against `eager`, in float32.

    python checks/sweep_transformers.py                 # all families, about half an hour on one core
    python checks/sweep_transformers.py llama t5 vit    # some
    python checks/sweep_transformers.py --json results/transformers_sweep.json

Compared are the outputs, the gradients of all parameters, left padding, two documents in a row, a prompt in pieces through a KV cache,
`logits_to_keep`, and `generate` with each kind of cache. Each must be equal to `eager` or raise an error that names what is not served.
Equal means that no entry differs by more than 2e-5 of the largest, in float64 where float32's rounding alone does more, as in SAM 3.
For a family whose outputs hardly depend on attention the sweep shows nothing; it measures that too. Exits with 1 if a family differs.

A family is a model type of transformers' auto classes, with its language-modelling head if it has one. Its tiny config comes from its
default config: `SMALL` gives sizes by the names of fields, `SPECIAL` what some families need besides.

One file because a family's entry in `SPECIAL` can only be understood together with the code that makes a model from it.
"""

import argparse
import copy
import inspect
import json
import multiprocessing
import re
import resource
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import flash_attention.integrations.hugging_face as integration

TOLERANCE = 2e-5  # largest error, relative to the largest entry, of outputs; a gradient may differ by five times as much
PARAMETERS = 100_000_000  # a model with more is not tiny
SECONDS = 120  # of processor time for one family
DIED = "the process died"
BATCH, LENGTH, PADDING = 2, 11, 4

HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM")

# The names of a config's fields, and what they become in a tiny model. The first that fits counts; lists keep their length.
SMALL = {
    r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers|depth|num_hidden_(en|de)coder_layers)": 2,
    r"(num_(attention_|q_|query_)?heads|n_heads?|(en|de)coder_(num_)?attention_heads|num_(en|de)coder_(attention_)?heads)": 4,
    r"(num_key_value_heads|num_kv_heads|(en|de)coder_num_key_value_heads|num_global_key_value_heads|num_kv_head)": 2,
    r"qk_rope_head_dim": 8,
    r"qk_head_dim": 24,
    r".*head_dim|d_kv|attention_head_size|v_head_dim": 16,
    r".*_lora_rank": 32,
    r".*vocab_size(_per_layer_input)?": 100,
    r"(n_routed|num_local|moe_num|num)_experts": 4,
    r"num_experts_per_tok(en)?|num_expert_group|moe_k|moe_topk|top_k_experts|experts_per_token|n_group": 2,
    r"topk_group|n_shared_experts": 1,
    r"max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len|n_ctx|max_target_length": 128,
    r"image_size|img_size|input_size": 32,
    r"patch_size": 8,
    r"num_mel_bins|n_mels": 16,
    r"sliding_window(_size)?|local_attention|attention_chunk_size": 5,
    r"index_topk": 4,
    r"index_n_heads": 2,
    r".*(size|dim|hidden|width|embd|d_model|ffn|rank|d_ff|channels|d_inner|filters).*": 64,
}

# Fields that some default configs leave unset.
UNSET = ("vocab_size", "head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")

GLM_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
SPECIAL: dict[str, dict] = {
    "qwen2_vl": {"text_config": MROPE},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_5_vl_text": MROPE,
    "gemma3n_text": SHARED_KV | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "gemma4_text": SHARED_KV,
    "gemma4": {"text_config": SHARED_KV},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "glm4v": {"text_config": GLM_ROPE},
    "glm4v_text": GLM_ROPE,
    "glm4v_moe": {"text_config": GLM_ROPE},
    "glm4v_moe_text": GLM_ROPE,
    "glm46v": {"text_config": GLM_ROPE},
    "glm_ocr": {"text_config": GLM_ROPE},
    "glm_ocr_text": GLM_ROPE,
    "glm_image": {"text_config": GLM_ROPE},
    "glm_image_text": GLM_ROPE,
    "glmga": {"text_config": GLM_ROPE},
    "glm5_next": {"text_config": {"index_kpool": 2, "num_key_value_heads": 4}},
    "glm5_next_text": {"index_kpool": 2, "num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "mistral4": {"qk_nope_head_dim": 8, "qk_head_dim": 16, "head_dim": 16},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
}


def families() -> dict[str, list[str]]:
    """Model type → classes, those with a language-modelling head first."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = {}
    for mapping in [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]:
        for kind, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                if name not in found.setdefault(kind, []):
                    found[kind].append(name)
    return dict(sorted(found.items()))


# ---- a tiny model


def small(name: str, value: int) -> int:
    if name.endswith(("token_id", "token_index")):
        return value if value < 100 else 50 + sum(map(ord, name)) % 50
    for pattern, new in SMALL.items():
        if re.fullmatch(pattern, name):
            return min(new, value)
    return value


def tiny(config, fixed: dict):
    """A config of the same class with small sizes, and a layer of each kind that the default has, at least two."""
    from transformers import PreTrainedConfig

    default = config.to_dict()
    layers = default.get("num_hidden_layers")
    kinds = default.get("layer_types") or default.get("layers_block_type") or []
    keep = sorted({kinds.index(kind) for kind in kinds})
    keep = keep if len(keep) > 1 else list(range(2))
    new: dict = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if default.get("is_encoder_decoder"):
        new["decoder_start_token_id"] = 1
    for name, value in default.items():
        part = config.__dict__.get(name)
        if isinstance(part, PreTrainedConfig):
            new[name] = tiny(part, fixed.get(name, {}))
        elif isinstance(value, bool) or name in ("transformers_version", "num_hidden_layers") or name in new:
            continue
        elif isinstance(value, int):
            new[name] = small(name, value)
        elif value is None and name in UNSET:
            new[name] = small(name, 1 << 30)
        elif isinstance(value, list) and layers and len(value) == layers:
            new[name] = [value[i] for i in keep]
        elif isinstance(value, dict) and "mrope_section" in value:
            new[name] = value | {"mrope_section": [4, 2, 2]}
    if layers:
        new["num_hidden_layers"] = min(layers, len(keep))
    if default.get("num_attention_heads", 0) == default.get("num_key_value_heads"):
        new["num_key_value_heads"] = new["num_attention_heads"]
    if default.get("head_dim") and default["head_dim"] == default.get("qk_rope_head_dim"):
        new["head_dim"] = new["qk_rope_head_dim"]
    if isinstance(default.get("num_heads"), list) and isinstance(default.get("embed_dim"), int):  # Swin: stages of growing width
        new |= {"embed_dim": 8 * default["num_heads"][0], "depths": [1] * len(default["num_heads"]), "window_size": 2, "image_size": 64}
    if "num_feat_extract_layers" in default:  # wav2vec 2.0: convolutions over the waveform
        new |= {"num_feat_extract_layers": 2, "conv_dim": [32, 32], "conv_kernel": [8, 4], "conv_stride": [4, 2]}
        new |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    new |= {name: value for name, value in fixed.items() if not isinstance(config.__dict__.get(name), PreTrainedConfig)}
    return type(config)(**new)


def build(kind: str, name: str) -> torch.nn.Module:
    """With random weights large enough that attention decides the outputs; gates that start at zero are open."""
    import transformers

    config = tiny(transformers.CONFIG_MAPPING[kind](), SPECIAL.get(kind, {}))
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    count = sum(p.numel() for p in model.parameters())
    if count > PARAMETERS:
        raise Unusable(f"not tiny: {count / 1e6:.0f} million parameters")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and p.numel():
                p.normal_(std=1.5 * (p.shape[0] / p.numel()) ** 0.5)
            elif p.is_floating_point():
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


class Unusable(Exception):
    """Why a family cannot be compared."""


# ---- inputs


def special_ids(config) -> set[int]:
    from transformers import PreTrainedConfig

    ids = set()
    for name, value in config.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            ids |= special_ids(value)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            ids.add(value)
    return ids


def first(config, *names, default=None):
    """The first of these fields that the config, or a part of it, has."""
    from transformers import PreTrainedConfig

    for name in names:
        value = config.__dict__.get(name)
        if value is not None:
            return value
    for part in config.__dict__.values():
        if isinstance(part, PreTrainedConfig) and (value := first(part, *names)) is not None:
            return value
    return default


def tokens(model, length: int) -> Tensor:
    usable = torch.tensor(sorted(set(range(3, 50)) - special_ids(model.config)))
    return usable[torch.randint(len(usable), (BATCH, length))]


def candidates(model) -> list[dict]:
    """Inputs to try, the likeliest first."""
    config, signature = model.config, inspect.signature(model.forward).parameters
    torch.manual_seed(1)
    decoder = {"decoder_input_ids": tokens(model, 7)} if "decoder_input_ids" in signature else {}
    mask = {"attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)} if "attention_mask" in signature else {}
    size = first(config, "image_size", "img_size", "input_size", default=32)
    H, W = size if isinstance(size, (list, tuple)) else (size, size)
    channels = first(config, "num_channels", "in_channels", default=3)
    mels = first(config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim", default=16)
    frames = 2 * (first(config, "max_source_positions", default=128) or 128)
    time_first, mel_first = torch.randn(BATCH, 64, mels), torch.randn(BATCH, mels, frames)
    images, wave = torch.randn(BATCH, channels, H, W), torch.randn(BATCH, 4000)
    found = []
    if "input_ids" in signature:
        found.append({"input_ids": tokens(model, LENGTH)} | mask | decoder)
    if "pixel_values" in signature:
        found.append({"pixel_values": images} | decoder)
        found += [{"input_ids": tokens(model, LENGTH), "pixel_values": images} | mask | decoder] if "input_ids" in signature else []
        found.append({"pixel_values": torch.randn(BATCH, first(config, "num_frames", default=2), channels, H, W)})
    for name in ("input_features", "input_values", "audio_values", "audio_mel", "spectrogram", "input_mels"):
        if name in signature:
            found += [{name: x} | decoder for x in (mel_first, time_first, wave, wave[:, None], torch.randn(BATCH, 1, 64, mels), images)]
    if "grid_thw" in signature or "image_grid_thw" in signature:
        side = 4 * first(config, "spatial_merge_size", "merge_size", default=1)
        patch, times = first(config, "patch_size", default=8), first(config, "temporal_patch_size", default=1)
        n = 2 * side * side
        grid = {name: torch.tensor([[1, side, side]] * 2) for name in ("grid_thw", "image_grid_thw") if name in signature}
        main = "hidden_states" if "hidden_states" in signature else "pixel_values"
        for shape in ((n, channels * times * patch * patch), (n, channels * patch * patch), (n, channels, patch, patch)):
            found.append({main: torch.randn(shape)} | grid)
    if "spatial_shapes" in signature:
        patches = torch.randn(BATCH, 16, channels * first(config, "patch_size", default=8) ** 2)
        shapes = {"pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long), "spatial_shapes": torch.tensor([[4, 4]] * BATCH)}
        found.append({"pixel_values": patches} | shapes | ({"input_ids": tokens(model, LENGTH)} if "input_ids" in signature else {}))
    if "pixel_values_videos" in signature:
        found.append({"pixel_values_videos": torch.randn(BATCH, first(config, "num_frames", "frames_per_clip", default=2), channels, H, W)})
    if "inputs_embeds" in signature:
        found.append({"inputs_embeds": torch.randn(BATCH, LENGTH, first(config, "hidden_size", "d_model", default=64))} | mask)
    if "hidden_states" in signature:
        found.append({"hidden_states": torch.randn(BATCH, LENGTH, first(config, "hidden_size", default=64))})
    return found


# ---- runs


def tensors(outputs, prefix: str = "") -> dict[str, Tensor]:
    """Every float tensor in a model's outputs, by name; caches and attention weights left out."""
    found = {}
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point() and outputs.numel():
            found[prefix] = outputs
    elif isinstance(outputs, dict) or hasattr(outputs, "items"):
        for name, x in outputs.items():
            if "attentions" not in name and "past_key_values" not in name:
                found |= tensors(x, f"{prefix}.{name}".strip("."))
    elif isinstance(outputs, (list, tuple)):
        for i, x in enumerate(outputs):
            found |= tensors(x, f"{prefix}[{i}]")
    return found


def error(got: dict[str, Tensor], want: dict[str, Tensor], scale: float | None = None) -> float:
    """The largest difference relative to the largest entry of each tensor; infinite if one is NaN where the other is not."""
    worst = 0.0
    if got.keys() != want.keys():
        return float("inf")
    for name in want:
        a, b = got[name], want[name]
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (x[b.isfinite()] for x in (a, b))
        if b.numel():
            worst = max(worst, ((a - b).abs().max() / (scale or b.abs().max()).clip(min=1e-12)).item())
    return worst


def seeded(model, **inputs):
    torch.manual_seed(2)
    return model(**copy.deepcopy(inputs))


class Runs:
    """The things that one model is asked to do; each method returns tensors by name."""

    def __init__(self, model, inputs: dict):
        self.model, self.inputs = model, inputs
        self.signature = inspect.signature(model.forward).parameters

    def names(self) -> list[str]:
        found = ["outputs", "gradients"]
        text = "input_ids" in self.inputs and "attention_mask" in self.inputs
        if text:
            found.append("left padding")
            if "position_ids" in self.signature and "decoder_input_ids" not in self.inputs:
                found.append("packed")
        if self.model.can_generate() and not text and "input_ids" not in self.inputs:
            found += ["generate, dynamic", "generate, static"]
        if text and self.model.can_generate():
            if "decoder_input_ids" not in self.inputs and "past_key_values" in self.signature:
                found.append("pieces")
            if "logits_to_keep" in self.signature:
                found.append("logits_to_keep")
            caches = ["dynamic", "static", "quantized"] + ["offloaded"] * (self.model.device.type == "cuda")
            found += [f"generate, {cache}" for cache in caches]
        return found

    def run(self, name: str) -> dict[str, Tensor]:
        what, _, cache = name.partition(", ")
        method = getattr(self, what.replace(" ", "_"))
        return method(cache) if cache else method()

    def outputs(self):
        with torch.no_grad():
            return tensors(seeded(self.model, **self.inputs))

    def gradients(self):
        self.model.zero_grad()
        found = tensors(seeded(self.model, **self.inputs))
        torch.manual_seed(3)
        total = 0.0
        for x in found.values():
            if x.requires_grad:
                x = x[x.isfinite()]  # some logits are -inf, always
                total = total + (x * torch.randn_like(x) / x.abs().max().detach().clip(min=1e-6)).sum()
        if not isinstance(total, Tensor):
            raise Unusable("no output has a gradient")
        total.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None and p.numel()}
        if not all(x.isfinite().all() for x in found.values()):
            raise Unusable("gradients are not finite")
        return found

    def padded(self) -> dict:
        real = torch.arange(LENGTH) >= torch.tensor([PADDING, 0])[:, None]
        return self.inputs | {"attention_mask": real.long()}

    def left_padding(self):
        inputs = self.padded()
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            found = tensors(seeded(self.model, **inputs))
        by_token = {name: x[real] for name, x in found.items() if x.shape[:2] == real.shape}
        return by_token or found  # pooled values may come from padding, whose rows are undefined

    def packed(self):
        """Two documents in a row, told apart by their positions alone."""
        positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5))).expand(BATCH, -1)
        with torch.no_grad():
            return tensors(seeded(self.model, input_ids=self.inputs["input_ids"], position_ids=positions, use_cache=False))

    def pieces(self):
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        seen, found = 0, {}
        for n in (5, 1, LENGTH - 6):
            inputs = {name: x[:, seen : seen + n] if name != "attention_mask" else x[:, : seen + n] for name, x in self.inputs.items()}
            with torch.no_grad():
                outputs = seeded(self.model, **inputs, past_key_values=cache, use_cache=True)
            found |= tensors(outputs.logits, f"from {seen}")
            seen += n
        return found

    def logits_to_keep(self):
        with torch.no_grad():
            return {
                f"{n} of {name}": x
                for name, inputs in (("all", self.inputs), ("padded", self.padded()))
                for n in (1, 3)
                for x in [seeded(self.model, **inputs, logits_to_keep=n).logits]
            }

    def generate(self, cache: str):
        """The logits of each step. Tokens would hide a small difference; where they differ, so do the logits."""
        from transformers import cache_utils

        found, options = {}, {"cache_implementation": cache}
        if cache == "quantized":
            # In its real dtype the last bit of a key decides how it is rounded, and 1e-7 becomes 6e-2; everything else is compared.
            cache_utils.Fp8QuantizedLayer.fp8_dtype = torch.float32
            options["cache_config"] = {"backend": "fp8"}
        for name, inputs in (("all", self.inputs), ("padded", self.padded())):
            inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
            if name == "padded" and "input_ids" not in inputs:
                continue
            torch.manual_seed(4)
            outputs = self.model.generate(
                **inputs, **options, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            found |= tensors(list(outputs.logits), name)
        return found


def examine(kind: str, names: list[str]) -> dict:
    """The table's entry for one family, with the first of its classes that can be built."""
    report: dict = {}
    for name in names:
        try:
            model = build(kind, name)
            if not model._can_set_attn_implementation():
                raise Unusable("does not use AttentionInterface")
            inputs = usable(model)
            break
        except Exception as e:
            report.setdefault("class", name)
            report.setdefault("reason", brief(e))
    else:
        return report
    report = {"class": name}
    runs, results = Runs(model, inputs), {}
    for what in runs.names():
        results[what] = result(runs, what, report)
        if what == "outputs":
            if isinstance(results[what], str):
                return report | {"reason": results[what], "runs": results}
            if not report["calls"]:
                return report | {"reason": "no layer reached the attention function"}
            if report["without attention"] < 1e-3:
                return report | {"reason": f"attention hardly changes the outputs: {report['without attention']:.0e}"}
    return report | {"runs": results}


def brief(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text[:160] if isinstance(e, Unusable) else f"{type(e).__name__}: {text[:160]}"


def usable(model) -> dict:
    """The first inputs that `eager` takes."""
    failures = []
    for inputs in candidates(model):
        try:
            with torch.no_grad():
                found = tensors(seeded(model, **inputs))
            if found and all(x.isfinite().any() for x in found.values()):
                return inputs
            failures.append("no finite outputs")
        except Exception as e:
            failures.append(brief(e))
    raise Unusable("no inputs fit: " + (failures[0] if failures else f"main_input_name is {model.main_input_name}"))


def result(runs: Runs, what: str, report: dict) -> float | str:
    """The error of one run, or why it has none."""
    model, name = runs.model, integration.register()
    try:
        model.set_attn_implementation("eager")
        want = runs.run(what)
    except Exception as e:
        return f"eager: {brief(e)}"
    scale = max((x.abs().max() for x in want.values()), default=torch.tensor(1.0)) if what == "gradients" else None
    allowed = TOLERANCE * (5 if what == "gradients" else 1)
    try:
        model.set_attn_implementation(name)
        with watched() as seen:
            got = runs.run(what)
    except NotImplementedError as e:
        return f"refused: {brief(e)}"
    except Exception as e:
        return f"RAISED: {brief(e)}"
    if what == "outputs":
        report["calls"] = seen.calls
        with watched(broken=True):
            report["without attention"] = error(runs.run(what), want)
    found = error(got, want, scale)
    if not found <= allowed:
        model.set_attn_implementation("eager")
        again = error(runs.run(what), want, scale)
        try:
            model.set_attn_implementation("sdpa")
            sdpa = f"{error(runs.run(what), want, scale):.1e}"
        except Exception as e:
            sdpa = brief(e)
        wide = error_in_float64(runs, what, name)
        if not wide <= allowed:
            return f"DIFFERS: {found:.1e}, in float64 {wide:.1e} (eager again {again:.1e}, sdpa {sdpa})"
        return wide
    return found


def error_in_float64(runs: Runs, what: str, name: str) -> float:
    """The error in float64, for models that amplify float32's rounding. Infinite if a layer accepts only float32."""
    inputs, results = runs.inputs, []
    try:
        runs.model.double()
        runs.inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
        for implementation in ("eager", "sdpa", name):
            runs.model.set_attn_implementation(implementation)
            results.append(runs.run(what))
        eager, sdpa, ours = results
        # In float64 `eager` gives NaN for padding, whose mask its float32 softmax rounds to -inf.
        want = eager if all(x.isfinite().all() for x in eager.values()) else sdpa
        return error(ours, want, max(x.abs().max() for x in want.values()) if what == "gradients" else None)
    except Exception:
        return float("inf")
    finally:
        runs.model.float()
        runs.inputs = inputs


@contextmanager
def watched(broken: bool = False):
    """Counts the calls of the attention function, or replaces its result by zeros."""
    from transformers import AttentionInterface

    seen = SimpleNamespace(calls=0)

    def attention(*args, **options):
        seen.calls += 1
        O, weights = integration.attention(*args, **options)
        return (torch.zeros_like(O) if broken else O), weights

    AttentionInterface.register(integration.register(), attention)
    try:
        yield seen
    finally:
        integration.register()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, all by default")
    parser.add_argument("--device", default="cpu", help="an offloaded cache needs a GPU")
    parser.add_argument("--json", type=Path, help="write the results here, beside those of other families")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    known = families()
    if unknown := set(args.families) - known.keys():
        parser.error(f"no such model types: {', '.join(sorted(unknown))}")
    results, failed = {}, 0
    for kind in args.families or known:
        start = time.perf_counter()
        results[kind] = report = in_a_process(kind, known[kind])
        failed += len(failures(report))
        for line in lines(kind, report):
            print(line, f"({time.perf_counter() - start:.0f} s)", flush=True)
    if args.json:
        write(args.json, results)
    print(f"{len(results)} families, {failed} failures")
    return bool(failed)


def write(path: Path, results: dict[str, dict]) -> None:
    """A line for each family, errors to two digits."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for kind, report in results.items():
        runs = {what: x if isinstance(x, str) else float(f"{x:.1e}") for what, x in report.get("runs", {}).items()}
        kept[kind] = {"class": report["class"]} | ({"reason": report["reason"]} if "reason" in report else {"runs": runs})
    path.write_text("{\n" + ",\n".join(f"{json.dumps(kind)}: {json.dumps(kept[kind])}" for kind in sorted(kept)) + "\n}\n")


def failures(report: dict) -> list[str]:
    """The runs that differ from `eager`, raise anything but NotImplementedError, or kill the process."""
    if report.get("reason", "").startswith(DIED):
        return ["everything"]
    return [what for what, x in report.get("runs", {}).items() if isinstance(x, str) and x.startswith(("DIFFERS", "RAISED"))]


def lines(kind: str, report: dict) -> list[str]:
    if "reason" in report:
        return [f"{kind:32} – {report['reason']}"]
    good = {what: x for what, x in report["runs"].items() if not isinstance(x, str)}
    found = [f"{kind:32} {max(good.values()):.1e} {', '.join(good)}"] if good else []
    return found + [f"{kind:32} {what}: {x}" for what, x in report["runs"].items() if isinstance(x, str)]


def in_a_process(kind: str, names: list[str]) -> dict:
    """In a fork, for a family that takes all memory or never returns."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work():
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with open("/dev/null", "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            send.send(examine(kind, names))

    process = context.Process(target=work)
    for wait in (1, 5, 25, None):  # a busy machine may have no process to spare
        try:
            process.start()
            break
        except BlockingIOError:
            if wait is None:
                raise
            time.sleep(wait)
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return {"class": names[0], "reason": f"{DIED}, or was not done after {SECONDS} s"}
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    sys.exit(main())
