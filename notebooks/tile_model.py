"""Lesson 8's model: how many cycles a step of `hopper`'s loop takes, and from that the forward or backward of a whole problem.

A step is one tile of keys against one tile of queries. The constants of a multiprocessor are read from the emulator's cost model
(cuda/emulator/model.h), tile sizes from the kernels, the backward's instructions from the profiler's counts (results/h200_cycles.json).
Two numbers of the backward are fitted (`FITTED`), each to one measured step, and one clock rate for all; nothing else is fitted.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass

from charts import kept_result
from IPython.display import HTML
from pictures import colour
from sources import constants, source

KNOWN = {name: float(value) for name, value in re.findall(r"X\((\w+), ([\d.]+), ", source("emulator/model.h"))}
MULTIPROCESSORS = 132  # of an H100 or H200
GROUP_ROWS = 64  # of Q, in the forward, that a group of four warps computes
FITTED = {
    "EXPOSED": 1.24,  # × the backward's instructions: the time that no product overlaps; fitted at D 128
}
SCORE, SEARCH = 3.5, 1  # a warp's instructions for one score of each thread, counted in the machine code; to search for a maximum
BETWEEN = 1060  # cycles from one tile of Q to the next in addition to its steps (LOG.md: 11 800 for four steps of 2 684)
GHZ = 1.73  # the clock while such kernels run; the power limit decides: 1.55 to 1.9 were seen


@dataclass
class Step:
    """cycles: the length of a step. busy: for how many of them it uses each unit. why_not: the reason why it does not fit."""

    cycles: float
    busy: dict[str, float]
    products: float  # FLOP
    why_not: str | None = None

    @property
    def tensor_share(self) -> float:
        return self.busy["tensor cores"] / self.cycles


def forward_step(D: int, groups: int | None = None, keys: int | None = None, stages: int = 2, searches: bool = False) -> Step:
    """A step of the forward: `groups` tiles of 64 queries against one of `keys` keys. None: as forward_4_tiles.cuh has it.
    searches: for each tile's maxima, as in float16."""
    tiles = constants("forward_4_tiles.cuh", HEAD_DIM=D)
    groups, keys = groups or tiles["CONSUMERS"], keys or tiles["BLOCK_K"]
    # ---- what one group needs, in cycles
    product = 2 * GROUP_ROWS * keys * D / KNOWN["TENSOR_FLOP"]  # for S; the same for O
    scores = GROUP_ROWS * keys // 128  # of each thread
    exponentials = (scores + 2) * KNOWN["EXPONENTIAL"]
    instructions = (SCORE + SEARCH * searches) * scores + 2.5 * (D + keys) / 16 + 110  # of a warp; O is rescaled too rarely to count
    held = 2 * product - KNOWN["WGMMA_DEPTH"] * D / 2  # the issue blocks until only the last four products of O are left
    # ---- cycles of shared memory: operands of S (64 rows of Q and all of K, 16 columns at a time), of O (V alone), and the copies
    S_operands = D / 16 * 32 * (GROUP_ROWS + keys) / KNOWN["SHARED_BYTES"]
    O_operands = keys / 16 * 32 * D / KNOWN["SHARED_BYTES"]
    bytes_copied = 2 * 2 * keys * D
    copied = bytes_copied / KNOWN["SHARED_BYTES"]

    def shared_by(others: float, need: float, cycles: float) -> float:
        """The cycles that work of `need` cycles takes while others use the unit for so many of the step's cycles."""
        return need / max(0.02, 1 - others / cycles)

    cycles = groups * 2 * product * 1.5
    for _ in range(400):
        tensor = sum(max(product, shared_by(copied, operands, cycles)) for operands in (S_operands, O_operands))
        chain = 0.0
        for need, unit in ((held, tensor), (exponentials, exponentials), (instructions, instructions)):
            chain += shared_by((groups - 1) * unit, need, cycles)
        cycles += 0.1 * (max(chain, groups * tensor, bytes_copied / KNOWN["L2_BYTES"]) - cycles)
    # ---- a ring of stages: a stage is free when its tile has been used, and full again a copy later
    copy = KNOWN["TMA_LATENCY"] + bytes_copied / 2 / KNOWN["L2_BYTES"]
    cycles = max(cycles, (cycles + copy) / stages)
    busy = {
        "tensor cores": groups * 2 * product,
        "exponentials": groups * exponentials,
        "instructions": groups * instructions,
        "shared memory": groups * (S_operands + O_operands) + copied,
        "copies": bytes_copied / KNOWN["L2_BYTES"],
    }
    return Step(cycles, busy, groups * 2 * product * KNOWN["TENSOR_FLOP"], _does_not_fit(D, groups, keys, stages))


def _does_not_fit(D: int, groups: int, keys: int, stages: int) -> str | None:
    registers = {1: 255, 2: 232, 3: 160}[groups]
    needed = keys // 2 + D // 2 + keys // 4 + 32  # S, O, P (two elements a register), and addresses, maxima, sums
    if needed > registers:
        return f"registers: about {needed} of {registers}"
    q_stages = 2 if D <= 128 else 1
    smem = q_stages * 64 * groups * D * 2 + stages * 2 * keys * D * 2 + 64 * groups * 128 * (2 if D > 64 else 1)
    return f"shared memory: {smem / 1024:.0f} of 226 KB" if smem > 226 * 1024 else None


def backward_step(D: int) -> Step:
    """A step of the backward, up to 128 columns. Its two groups are at most a step apart, so they do the same thing at about one time."""
    tiles = constants("backward_4_hopper.cu", HEAD_DIM=D)
    keys, rows = tiles["BLOCK_K"], tiles["BLOCK_Q"]
    product = 2 * keys * rows * D / KNOWN["TENSOR_FLOP"]  # for S; the same for dP, dV, dK and dQ
    slower = max(1.0, 32 * (64 + rows) / KNOWN["SHARED_BYTES"] / (2 * 64 * rows * 16 / KNOWN["TENSOR_FLOP"]))  # S and dP
    tensor = (3 + 2 * slower) * product
    exponentials = 2 * (keys * rows / 256) * KNOWN["EXPONENTIAL"]
    counted = measured("backward", D)
    instructions = counted["instructions"] / (counted["blocks"] * counted["steps_of_block"]) / 4  # of a quarter of the multiprocessor
    cycles = tensor + FITTED["EXPOSED"] * instructions
    busy = {"tensor cores": 5 * product, "exponentials": exponentials, "instructions": instructions}
    return Step(cycles, busy, 5 * product * KNOWN["TENSOR_FLOP"])


def shape(part: str, D: int, B: int, H: int, N: int) -> tuple[int, int]:
    """The work items (tiles) of a dense problem, and the steps of each."""
    if part == "forward":
        tiles = constants("forward_4_tiles.cuh", HEAD_DIM=D)
        return B * H * math.ceil(N / tiles["BLOCK_Q"]), math.ceil(N / tiles["BLOCK_K"])
    tiles = constants("backward_4_hopper.cu", HEAD_DIM=D)
    return B * H * math.ceil(N / tiles["BLOCK_K"]), math.ceil(N / tiles["BLOCK_Q"])


def measured(part: str, D: int) -> dict[str, float] | None:
    """The profiler's counts of `hopper` at this head size, and the cycles of one of its steps, prologue and epilogue included."""
    kept = kept_result("h200_cycles")
    if kept is None:
        return None
    row = next(row for row in kept["results"] if (row["rung"], row["part"], row["h"] * row["d"], row["d"]) == ("hopper", part, 2048, D))
    items, steps = shape(part, D, row["b"], row["h"], row["n"])
    step = row["cycles"] / (math.ceil(items / MULTIPROCESSORS) * steps)
    return {**row, "blocks": items, "steps_of_block": steps, "step": step}


def problem_cycles(part: str, D: int, B: int, H: int, N: int, searches: bool = False) -> float:
    """The main kernel of a whole dense problem: the multiprocessors take items in rounds, and the last round is as long as any."""
    items, steps = shape(part, D, B, H, N)
    step = forward_step(D, searches=searches) if part == "forward" else backward_step(D)
    return math.ceil(items / MULTIPROCESSORS) * (steps * step.cycles + (BETWEEN if part == "forward" else 0))


# ---- the model with sliders


def explorer() -> HTML:
    """Sliders for head size, groups, keys of a tile and stages; bars for the cycles of each unit and of the step. It works in the exported
    page, without a kernel: every combination is computed here, and the page only selects one."""
    choices = {"D": [64, 128, 256], "groups": [1, 2, 3], "keys": [64, 128, 192], "stages": [1, 2, 3]}
    found = {}
    for setting in itertools.product(*choices.values()):
        step = forward_step(*setting)
        found[" ".join(map(str, setting))] = [
            round(step.cycles),
            [round(x) for x in step.busy.values()],
            round(100 * step.tensor_share),
            step.why_not,
        ]
    units = list(forward_step(128).busy)
    colours = [colour(name) for name in ("S", "P", "done", "in fast memory", "K")]
    start = [1, 1, 1, 1]  # D 128, two groups, 128 keys, two stages
    rows = "".join(
        f'<label style="display:block">{name} <input type="range" min="0" max="2" value="{start[n]}"> <output></output></label>'
        for n, name in enumerate(("head size D", "groups of 64 queries", "keys of a tile", "stages"))
    )
    bars = "".join(
        f'<div style="display:flex;align-items:center;gap:0.5em"><span style="width:8em;text-align:right">{unit}</span>'
        f'<span style="width:26em;background:#eeeeee"><span style="display:block;height:1.1em;width:0;background:{shade}"></span></span>'
        f"<output></output></div>"
        for unit, shade in zip(units, colours, strict=True)
    )
    script = """
(function () {
  const box = document.currentScript.parentElement, choices = CHOICES, found = FOUND;
  const sliders = [...box.querySelectorAll("input")], names = Object.keys(choices);
  function show() {
    const setting = sliders.map((slider, n) => choices[names[n]][slider.value]);
    sliders.forEach((slider, n) => slider.nextElementSibling.value = setting[n]);
    const [cycles, busy, share, whyNot] = found[setting.join(" ")];
    [...box.querySelectorAll(".bars > div")].forEach((row, n) => {
      row.children[1].firstElementChild.style.width = Math.min(100, 100 * busy[n] / cycles) + "%";
      row.children[2].value = busy[n] + " of " + cycles + " cycles";
    });
    box.querySelector(".says").textContent = "a step takes " + cycles + " cycles, of which the tensor cores multiply " + share + " %"
      + (whyNot ? " - but this does not fit: " + whyNot : "");
  }
  sliders.forEach(slider => slider.addEventListener("input", show));
  show();
})();
""".replace("CHOICES", json.dumps(choices)).replace("FOUND", json.dumps(found))
    words = "The sliders need a page that runs scripts: open the exported lesson, build/notebooks/lesson_8_why_this_fast.html."
    return HTML(
        f'<div class="tile-model" style="font-size:90%">{rows}<div class="bars">{bars}</div><p class="says">{words}</p>'
        f"<script>{script}</script></div>"
    )
