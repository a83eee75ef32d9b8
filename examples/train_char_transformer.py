"""A small transformer learns to write Python, character by character, from the standard library's own sources.

    python examples/train_char_transformer.py                        # about two minutes on two CPU cores
    python examples/train_char_transformer.py --attention normal     # the same losses, with the whole N × N matrix
    python examples/train_char_transformer.py --resume               # go on from the last checkpoint, exactly
    python examples/train_char_transformer.py --window 64 --pack     # each character sees 64 before it, and none of another file
    python examples/train_char_transformer.py --preset gpu           # tokens per second, flash beside normal
    torchrun --nproc_per_node 2 examples/train_char_transformer.py --context_parallel   # each text spread over two processes

Writes checkpoint.pt, losses.json, losses.png and sample.txt to --out. Section by section: data, model, training, sample, command line.

One file because it is an example: it is read from top to bottom, and copied as a whole.
"""

import argparse
import json
import math
import os
import sys
import sysconfig
import time
import zlib
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from flash_attention import command_line, flash_attention, parallel
from flash_attention.reference import normal_attention_causal

# ---- data: the .py files of Python's standard library

CHARACTERS = 128  # ASCII; other characters are read as "?"


class Text(NamedTuple):
    characters: Tensor  # (n,), uint8
    file: Tensor  # (n,), int32: the number of the file that each is from


def read_sources() -> tuple[Text, Text]:
    """Training and validation text. About every tenth file, chosen by its name, is for validation: whole files, so that no function is in
    both."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise FileNotFoundError(f"no .py files in {sysconfig.get_paths()['stdlib']}: this Python's standard library has no sources")
    parts: dict[bool, list[str]] = {False: [], True: []}
    for file in files:
        parts[zlib.crc32(file.name.encode()) % 10 == 0].append(file.read_text(encoding="utf-8"))
    return joined(parts[False]), joined(parts[True])


def joined(files: list[str]) -> Text:
    """Concatenates the files, with a line end after each."""
    lengths = torch.tensor([len(text) + (n + 1 < len(files)) for n, text in enumerate(files)])
    return Text(encode("\n".join(files)), torch.repeat_interleave(torch.arange(len(files), dtype=torch.int32), lengths))


def encode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8)


def decode(characters: Tensor) -> str:
    return bytes(characters.tolist()).decode("ascii")


def batch(text: Text, size: int, length: int, random: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random excerpts of the text and the characters that follow: x, y (B, N), int64; and the file of each character of x, (B, N)."""
    starts = torch.randint(len(text.characters) - length, (size, 1), generator=random)  # (B, 1)
    places = starts + torch.arange(length + 1)
    stretches = text.characters[places].long().to(device)  # (B, N + 1)
    return stretches[:, :-1], stretches[:, 1:], text.file[places[:, :-1]].to(device)


def spans_of_files(file: Tensor) -> Tensor:
    """file (B, N) → spans (B, 1, N, 2) in which files do not see each other: `spans.documents` for a batch."""
    file = file.contiguous()
    return torch.stack([torch.searchsorted(file, file, right=right) for right in (False, True)], -1).int()[:, None]


# ---- model: GPT-2's (Radford et al. 2019), with the attention as an argument

ATTENTION = {"flash": partial(flash_attention, causal=True), "normal": normal_attention_causal}  # normal takes no window and no spans


def in_shares(cache: list | None) -> bool:
    """Whether the model gets this process's share of each text (--context_parallel), or, as for a sample, the whole text."""
    return dist.is_initialized() and cache is None


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, attention: str, window: int | None):
        super().__init__()
        self.heads = heads
        self.attend = ATTENTION[attention] if window is None else partial(ATTENTION[attention], window=(window, None))
        self.norm_1, self.to_qkv, self.to_out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: list[Tensor] | None, spans: Tensor | None) -> Tensor:
        """x (B, N, dim) → (B, N, dim). The cache, if any, holds the keys and values of all characters before x, and then of x too."""
        q, k, v = self.to_qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D), views
        if cache is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache, (k, v), strict=True)) if cache else (k, v)
            cache[:] = k, v
        attend = partial(parallel.parallel_attention, causal=True) if in_shares(cache) else self.attend
        O = (
            attend(q, k, v) if spans is None else attend(q, k, v, spans=spans)
        )  # bottom-right alignment: with a cache, the N queries are the last of the Nk positions
        x = x + self.dropout(self.to_out(O.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm_2(x)))))


class Transformer(nn.Module):
    def __init__(self, layers: int, heads: int, dim: int, length: int, dropout: float, attention: str, window: int | None = None):
        super().__init__()
        self.length = length
        self.character, self.position = nn.Embedding(CHARACTERS, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, attention, window) for _ in range(layers))
        self.norm, self.to_logits = nn.LayerNorm(dim), nn.Linear(dim, CHARACTERS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # smaller for layers that add to the residual stream, two in each block
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if "to_out" in name or "down" in name else 1))

    def forward(self, characters: Tensor, caches: list[list[Tensor]] | None = None, spans: Tensor | None = None) -> Tensor:
        """(B, N) → logits of each next character (B, N, 128). With caches, one a block, the characters follow those already seen. spans
        (B, 1, N, 2): what each may see, if not all before it."""
        seen = caches[0][0].shape[2] if caches and caches[0] else 0
        place = torch.arange(seen, seen + characters.shape[1], device=characters.device)
        if in_shares(caches):
            place = parallel.positions(len(place) * dist.get_world_size(), device=place.device)
        x = self.character(characters) + self.position(place)  # (B, N, dim)
        for n, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[n], spans)
        return self.to_logits(self.norm(x))


# ---- training

SETTINGS = (
    *("layers", "heads", "dim", "length", "batch", "steps", "rate", "dropout", "seed", "attention", "dtype", "device", "compile"),
    *("window", "pack"),
)


class Refused(ValueError):
    """The data or a checkpoint do not fit the command line."""


def add_parts(x: Tensor) -> Tensor:
    """In place, the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Training:
    """A model, its optimizer and everything else that determines how training continues; `state()` returns all of it."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args = args
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        sizes = args.layers, args.heads, args.dim, args.length
        self.model = Transformer(*sizes, args.dropout, args.attention, args.window).to(args.device)
        self.run = torch.compile(self.model) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
        self.random = torch.Generator().manual_seed(args.seed)  # draws the batches: its state is the position in the data
        self.losses: list[float] = []  # after each step
        self.validation: list[tuple[int, float]] = []  # (steps done, loss)

    def loss(self, x: Tensor, y: Tensor, file: Tensor) -> Tensor:
        """The mean over all characters, or, with --context_parallel, this process's part of it."""
        if dist.is_initialized():
            x, y = parallel.shard(x, dim=1), parallel.shard(y, dim=1)
        dtype = getattr(torch, self.args.dtype)
        with torch.autocast(torch.device(self.args.device).type, dtype, enabled=dtype != torch.float32):
            logits = self.run(x, spans=spans_of_files(file) if self.args.pack else None)
        return functional.cross_entropy(logits.float().flatten(0, 1), y.flatten()) / self.processes

    def step(self, x: Tensor, y: Tensor, file: Tensor) -> Tensor:
        """One update; the loss before it. The rate warms up, then falls along a cosine to a tenth."""
        done = len(self.losses) / self.args.steps
        self.optimizer.param_groups[0]["lr"] = self.args.rate * min(done * 20 + 0.05, 0.55 + 0.45 * math.cos(math.pi * done))
        loss = self.loss(x, y, file)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.model.parameters():
            add_parts(parameter.grad)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return add_parts(loss.detach())

    @torch.no_grad()
    def validate(self, text: Text, batches: int = 8) -> float:
        """Mean loss on always the same excerpts, drawn without using the training's random numbers."""
        random = torch.Generator().manual_seed(0)
        self.model.eval()
        losses = [self.loss(*batch(text, self.args.batch, self.args.length, random, self.args.device)) for _ in range(batches)]
        self.model.train()
        return add_parts(torch.stack(losses).mean()).item()

    def state(self) -> dict:
        return {
            "settings": {name: getattr(self.args, name) for name in SETTINGS},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.random.get_state(),
            "random": torch.get_rng_state(),  # dropout's, on a CPU
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "losses": self.losses,
            "validation": self.validation,
        }

    def load_state(self, state: dict) -> None:
        settings = {"window": None, "pack": False} | state["settings"]  # which older checkpoints do not name
        other = [f"{name} {settings[name]!r}" for name in SETTINGS if settings[name] != getattr(self.args, name)]
        if other:
            raise Refused(f"the checkpoint was written with other settings: {', '.join(other)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["data"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])
        self.losses, self.validation = state["losses"], state["validation"]


def save(state: dict, path: Path) -> None:
    """Atomic: a process that dies while writing leaves the previous checkpoint intact."""
    partial_file = path.with_suffix(".partial")
    with partial_file.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial_file.replace(path)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def train(args: argparse.Namespace) -> Training:
    training_text, validation_text = read_sources()
    shortest = min(len(text.characters) for text in (training_text, validation_text))
    if args.length >= shortest:
        raise Refused(f"--length must be less than the {shortest} characters of a text, got {args.length}")
    training = Training(args)
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        training.load_state(torch.load(checkpoint, map_location="cpu", weights_only=True))
    parameters = sum(p.numel() for p in training.model.parameters())
    if is_first():
        counts = [f"{len(text.characters):,}" for text in (training_text, validation_text)]
        print(f"{counts[0]} characters for training, {counts[1]} for validation; {parameters:,} parameters")
    disable = None if is_first() else True  # None: drawn on a terminal only
    with tqdm(total=args.steps, initial=len(training.losses), unit="step", disable=disable) as bar:
        while len(training.losses) < args.steps:
            drawn = batch(training_text, args.batch, args.length, training.random, args.device)
            training.losses.append(training.step(*drawn).item())
            steps = len(training.losses)
            if steps % args.validate_every == 0 or steps in (1, args.steps):
                training.validation.append((steps, training.validate(validation_text)))
                if is_first():
                    bar.write(f"step {steps:5}: training loss {training.losses[-1]:.4f}, validation loss {training.validation[-1][1]:.4f}")
            if is_first() and (steps % args.checkpoint_every == 0 or steps == args.steps):
                save(training.state(), checkpoint)
            bar.set_postfix(loss=f"{training.losses[-1]:.3f}", refresh=False)
            bar.update()
    return training


def plot(training: Training, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(training.losses) + 1), training.losses, linewidth=0.8, label="training")
    axes.plot(*zip(*training.validation, strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per character", title=f"{training.args.attention} attention")
    axes.legend()
    figure.savefig(path, dpi=120)


# ---- sample


@torch.no_grad()
def sample(model: Transformer, prompt: str, length: int, temperature: float, random: torch.Generator) -> str:
    """The prompt and the model's continuation, `length` characters in all. Keys and values are computed once per character and cached."""
    model.eval()
    device = model.position.weight.device
    text = encode(prompt).long()[None].to(device)  # (1, N)
    caches: list[list[Tensor]] = [[] for _ in model.blocks]
    new = text
    while text.shape[1] < min(length, model.length):
        logits = model(new, caches)[0, -1].float()  # (128,)
        new = torch.multinomial((logits / temperature).softmax(0).cpu(), 1, generator=random)[None].to(device)  # (1, 1)
        text = torch.cat([text, new], dim=1)
    model.train()
    return decode(text[0])


# ---- flash beside normal, on a GPU

LENGTHS = 1024, 4096


def compare_speed(args: argparse.Namespace) -> None:
    """Prints tokens per second (median of the rounds, in which the two take turns) and peak memory of a training step."""
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.layers} layers, {args.heads} heads, dim {args.dim}, {args.dtype}"
    )
    text, _ = read_sources()
    tokens = args.batch * args.length
    for args.length in LENGTHS:
        args.batch = tokens // args.length
        speed: dict[str, list[float]] = {name: [] for name in ATTENTION}
        memory: dict[str, float] = {}
        for args.attention in list(ATTENTION) * 3:
            training = Training(args)
            drawn = batch(text, args.batch, args.length, training.random, args.device)
            for step in range(3 + args.steps):
                if step == 3:  # the first steps compiled kernels and set up the optimizer
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    start = time.perf_counter()
                training.step(*drawn)
            torch.cuda.synchronize()
            speed[args.attention].append(tokens * args.steps / (time.perf_counter() - start))
            memory[args.attention] = torch.cuda.max_memory_allocated() / 1e9
            del training
        for name in ATTENTION:
            print(f"N {args.length:4}, batch {args.batch:2}, {name:6}: {median(speed[name]):9,.0f} tokens/s, {memory[name]:.2f} GB at peak")
        faster, smaller = median(speed["flash"]) / median(speed["normal"]), memory["flash"] / memory["normal"]
        print(f"N {args.length:4}: flash is {faster:.2f} times as fast and takes {smaller:.2f} times the memory")


# ---- command line

PRESETS = {
    "cpu": {"layers": 4, "heads": 4, "dim": 128, "length": 128, "batch": 16, "steps": 600, "dtype": "float32", "device": "cpu"},
    "gpu": {"layers": 6, "heads": 12, "dim": 768, "length": 4096, "batch": 4, "steps": 20, "dtype": "bfloat16", "device": "cuda"},
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="cpu: train; gpu: time a training step at N 1024 and 4096")
    parser.add_argument("--attention", choices=ATTENTION, default="flash")
    for name in ("layers", "heads", "dim", "length", "batch", "steps"):
        parser.add_argument(f"--{name}", type=command_line.positive, default=argparse.SUPPRESS, help="default: the preset's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=argparse.SUPPRESS, help="of matmuls; default: the preset's")
    parser.add_argument("--device", type=command_line.device, default=argparse.SUPPRESS, help="default: the preset's")
    rate = "the optimizer's largest; at 2e-3 rounding errors grow from step to step"
    parser.add_argument("--rate", type=command_line.positive_number, default=1e-3, help=rate)
    parser.add_argument("--dropout", type=command_line.probability, default=0.0, help="after attention and after the MLP")
    parser.add_argument("--seed", type=command_line.seed, default=0)
    parser.add_argument("--window", type=command_line.positive, help="how many characters before its own one sees; default: all")
    parser.add_argument("--pack", action="store_true", help="characters see those of their own file alone")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--context_parallel", action="store_true", help="under torchrun: each text is spread over the processes")
    parser.add_argument("--resume", action="store_true", help="from --out's checkpoint; every setting must be as it was")
    parser.add_argument("--out", type=command_line.output_folder, default=Path("profiles/char_transformer"))
    for name in ("checkpoint_every", "validate_every"):
        parser.add_argument(f"--{name}", type=command_line.positive, default=100, help="steps")
    parser.add_argument("--prompt", default="def ", help="ASCII, what the sample begins with")
    parser.add_argument("--temperature", type=command_line.positive_number, default=0.9)
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        setattr(args, name, getattr(args, name, value))
    if args.dim % args.heads:
        parser.error(f"--heads must divide --dim, got {args.heads} and {args.dim}")
    if not 1 <= len(args.prompt) <= args.length:
        parser.error(f"--prompt must have 1 to --length {args.length} characters, got {len(args.prompt)}")
    if args.context_parallel and "WORLD_SIZE" not in os.environ:
        parser.error("--context_parallel runs under torchrun, which starts the processes")
    if args.context_parallel and args.length % (2 * int(os.environ["WORLD_SIZE"])):
        parser.error(f"--context_parallel over {os.environ['WORLD_SIZE']} processes needs a --length that twice as many divide")
    for name, value in (("attention", "flash"), ("dropout", 0.0), ("compile", False), ("preset", "cpu")):
        if args.context_parallel and getattr(args, name) != value:
            parser.error(f"--context_parallel goes with --{name} {value} only, got {getattr(args, name)}")
    if args.resume and not (args.out / "checkpoint.pt").exists():
        parser.error(f"nothing to resume: there is no {args.out / 'checkpoint.pt'}")
    if args.attention == "normal" and (args.window is not None or args.pack):
        parser.error("--attention normal takes neither --window nor --pack")
    if args.preset == "gpu" and (args.window is not None or args.pack):
        parser.error("--preset gpu compares with normal attention, which takes neither --window nor --pack")
    if args.context_parallel and (args.window is not None or args.pack):
        parser.error("--context_parallel takes neither --window nor --pack")
    if args.preset == "gpu" and not torch.cuda.is_available():
        parser.error("--preset gpu needs a CUDA GPU, and torch finds none")
    if args.preset == "gpu" and args.device == "cpu":
        parser.error("--preset gpu measures a GPU, got --device cpu")
    if args.preset == "gpu" and args.batch * args.length < max(LENGTHS):
        parser.error(f"--preset gpu needs --batch · --length of at least {max(LENGTHS)}, got {args.batch} · {args.length}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if args.preset == "gpu":
            return compare_speed(args)
        if args.context_parallel:
            if args.device.startswith("cuda"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        training = train(args)
    except Refused as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.context_parallel:
        first = is_first()
        dist.destroy_process_group()
        if not first:
            return
    plot(training, args.out / "losses.png")
    (args.out / "losses.json").write_text(json.dumps({"training": training.losses, "validation": training.validation}))
    text = sample(training.model, args.prompt, args.length, args.temperature, torch.Generator().manual_seed(args.seed))
    (args.out / "sample.txt").write_text(text)
    print(f"{text}\n\nlosses.json, losses.png, sample.txt and checkpoint.pt are in {args.out}")


if __name__ == "__main__":
    main()
