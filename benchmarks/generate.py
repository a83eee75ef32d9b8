"""Tokens per second that a small random Llama generates in transformers, with each of its caches: this project's attention beside sdpa.

    python -m benchmarks.generate --json results/h200_generate.json

bfloat16 on a GPU. Every new token is one query per head against all tokens before it. Both use the same random weights and take turns.
"""

import argparse
import time
from statistics import median

import torch

from benchmarks import report
from flash_attention import command_line

CACHES = ("dynamic", "static", "sliding")


def model_of(cache: str, quick: bool):
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4}
    if quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    others = {"vocab_size": 1000, "max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    torch.manual_seed(0)
    if cache == "sliding":
        return MistralForCausalLM(MistralConfig(**sizes, **others, sliding_window=32 if quick else 4096))
    return LlamaForCausalLM(LlamaConfig(**sizes, **others))


def run(cache: str, B: int, prompt: int, tokens: int, device: str, quick: bool, repeats: int) -> dict:
    """Tokens per second of each attention, over all sequences, not counting the first token, which comes from the prompt."""
    from flash_attention.integrations.hugging_face import register

    model = model_of(cache, quick).to(device, torch.bfloat16 if device != "cpu" else torch.float32).eval()
    inputs = torch.randint(1, 1000, (B, prompt), device=device)
    options = {"do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}

    def seconds(new: int) -> float:
        start = time.perf_counter()
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), min_new_tokens=new, max_new_tokens=new, **options)
        assert made.shape == (B, prompt + new)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = {name: [] for name in ("sdpa", register())}
    for n in range(repeats + 1):
        for name, found in times.items():
            model.set_attn_implementation(name)
            first, all_of_them = seconds(1), seconds(tokens)
            if n:  # after one to warm up
                found.append(all_of_them - first)
    rates = {name: B * (tokens - 1) / median(found) for name, found in times.items()}
    sdpa, ours = rates.values()
    case = {"cache": cache, "B": B, "prompt": prompt, "tokens": tokens}
    return case | {"sdpa": sdpa, "flash_attention": ours, "over sdpa": ours / sdpa}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=command_line.output_file, metavar="FILE", help="write device, versions and every figure")
    parser.add_argument("--quick", action="store_true", help="tiny, on a CPU too")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        parser.error("a CPU is too slow for this: --quick")
    cases = ((2, 40, 8),) if arguments.quick else ((1, 8192, 64), (16, 4096, 64))
    rows = []
    for cache in CACHES:
        for case in cases:
            row = run(cache, *case, device, arguments.quick, 1 if arguments.quick else 2)
            rows.append(row)
            print(" ".join(f"{key} {x:.2f}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items()), flush=True)
    if arguments.json:
        report.write_json(arguments.json, report.environment(device), {"quick": arguments.quick}, rows)
    return 0


if __name__ == "__main__":
    command_line.run(main)
