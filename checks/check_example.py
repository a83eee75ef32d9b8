"""The training example at a tiny size: flash and normal losses agree, it learns, and it resumes exactly after being killed.

python checks/check_example.py
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from harness import run_alone

SCRIPT = Path(__file__).parents[1] / "examples" / "train_char_transformer.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # with more threads, waiting would take longer than computing
TINY = ["--layers=2", "--heads=2", "--dim=32", "--length=48", "--batch=4", "--steps=200", "--validate_every=40"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(example, out: Path, *arguments: str) -> dict[str, list]:
    example.main([*TINY, "--out", str(out), *arguments])
    return json.loads((out / "losses.json").read_text())


def check_losses(example, tmp_path):
    """200 float32 steps from one seed: flash and normal attention give the same losses within 1e-3, and they fall."""
    flash, normal = (curves(example, tmp_path / name, "--attention", name) for name in ("flash", "normal"))
    assert len(flash["training"]) == 200
    worst = max(abs(a - b) for a, b in zip(flash["training"], normal["training"], strict=True))
    print(f"largest difference between the losses {worst:.1e}; validation {flash['validation'][0]} … {flash['validation'][-1]}")
    assert worst < 1e-3
    assert flash["training"] != normal["training"], "bit for bit the same: both ran on one kind of attention"
    assert flash["validation"][0][1] > 4.5 and flash["validation"][-1][1] < 3.3
    assert (tmp_path / "flash" / "losses.png").read_bytes().startswith(b"\x89PNG")


def check_resume_after_kill(tmp_path):
    """Killed (SIGKILL) in the middle and resumed, with dropout: every loss equals that of an uninterrupted run bit for bit."""
    arguments = [*TINY, "--steps=100", "--dropout=0.1", "--checkpoint_every=20"]

    def command(out: str, *more: str) -> list[str]:
        return [sys.executable, str(SCRIPT), *arguments, "--out", str(tmp_path / out), *more]

    def losses(out: str) -> dict:
        return json.loads((tmp_path / out / "losses.json").read_text())

    subprocess.run(command("whole"), env=ONE_THREAD, check=True, capture_output=True)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen(command("killed"), env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -9 and checkpoint.exists() and not (tmp_path / "killed" / "losses.json").exists()
    done = len(torch.load(checkpoint, weights_only=True)["losses"])
    assert 0 < done < 100
    checkpoint.with_suffix(".partial").write_bytes(b"what a kill during a write leaves")
    subprocess.run(command("killed", "--resume"), env=ONE_THREAD, check=True, capture_output=True)
    print(f"killed after a checkpoint at step {done}")
    assert losses("killed") == losses("whole")
    assert (tmp_path / "killed" / "sample.txt").read_text() == (tmp_path / "whole" / "sample.txt").read_text()


def check_checkpoint_is_atomic(example, tmp_path, monkeypatch):
    """An interrupted write leaves the previous checkpoint intact."""
    path = tmp_path / "checkpoint.pt"
    example.save({"losses": [1.0]}, path)

    def break_off(state, file):
        file.write(b"half a checkpoint")
        raise OSError("no space left")

    monkeypatch.setattr(example.torch, "save", break_off)
    with pytest.raises(OSError, match="no space left"):
        example.save({"losses": [1.0, 2.0]}, path)
    assert torch.load(path, weights_only=True) == {"losses": [1.0]}


def check_context_parallel(example, tmp_path):
    """Each text spread over two processes: the same losses, which fall; one process writes."""
    settings = [*TINY, "--steps=60"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(SCRIPT), "--context_parallel", *settings, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step    60:") == 1, done.stdout
    two, one = json.loads((tmp_path / "two" / "losses.json").read_text()), curves(example, tmp_path / "one", *settings)
    assert two["training"][-1] < two["training"][0] - 0.5
    worst = max(abs(a - b) for a, b in zip(two["training"], one["training"], strict=True))
    last = abs(two["validation"][-1][1] - one["validation"][-1][1])
    print(f"largest difference between the losses {worst:.1e}, of the last validation {last:.1e}")
    assert worst < 1e-4 and last < 1e-4
    assert (tmp_path / "two" / "sample.txt").read_text().startswith("def ")


def check_context_parallel_refuses(example, tmp_path, monkeypatch, capsys):
    """Refused: no torchrun, a length that does not divide, options that do not combine."""
    refusals = [
        ([], None, "torchrun"),
        (["--length=50"], "4", "--length"),
        (["--dropout=0.1"], "2", "dropout"),
        (["--attention=normal"], "2", "attention"),
    ]
    for more, size, word in refusals:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SystemExit, match="2"):
            curves(example, tmp_path, "--context_parallel", *more)
        assert word in capsys.readouterr().err


def check_resume_refuses(example, tmp_path, capsys):
    """Refused: settings that differ from the checkpoint's, and a missing checkpoint."""
    few = "--steps", "3"
    with pytest.raises(SystemExit, match="2"):
        curves(example, tmp_path, *few, "--resume")
    curves(example, tmp_path, *few)
    with pytest.raises(SystemExit, match="2"):
        curves(example, tmp_path, *few, "--resume", "--rate", "0.1")
    assert "the checkpoint was written with other settings: rate 0.001" in capsys.readouterr().err


def check_length_of_the_text(example, tmp_path, capsys):
    """A window longer than a text is refused before the model is made."""
    with pytest.raises(SystemExit, match="2"):
        curves(example, tmp_path, "--length", str(10**9))
    assert "--length must be less than the" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ("flash", "normal"))
def check_sample(example, attention):
    """ASCII text that begins with the prompt; with kept keys and values the same as when everything is recomputed for each character."""
    torch.manual_seed(0)
    model = example.Transformer(layers=2, heads=2, dim=32, length=40, dropout=0.1, attention=attention)
    text = example.sample(model, "def f", 40, 1.0, torch.Generator().manual_seed(1))
    assert len(text) == 40 and text.startswith("def f") and text.isascii() and model.training
    model.eval()
    characters = example.encode(text).long()[None]
    caches = [[] for _ in model.blocks]
    pieces = torch.cat([model(piece, caches) for piece in characters.split([5, 1, 30, 4], dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(characters), atol=2e-6, rtol=0)
    random = torch.Generator().manual_seed(1)
    for n in range(5, 40):
        expected = torch.multinomial(model(characters[:, :n])[0, -1].softmax(0), 1, generator=random)
        assert expected == characters[0, n], f"character {n} of {text!r}"


def check_data(example):
    """Split by file: each source is wholly on one side, and both sides have several."""
    texts = example.read_sources()
    sides = [example.decode(text.characters) for text in texts]
    files = [example.decode(example.encode(f.read_text(encoding="utf-8"))) for f in Path(sysconfig.get_paths()["stdlib"]).glob("*.py")]
    count = [sum(file in side for file in files if len(file) > 1000) for side in sides]
    assert sum(count) == sum(len(file) > 1000 for file in files) and min(count) >= 5, count
    for text, side in zip(texts, sides, strict=True):
        of_file = side[: int((text.file == 0).sum())]
        assert len(text.file) == len(side) and text.file.diff().unique().tolist() == [0, 1]
        assert of_file.endswith("\n") and any(of_file[:-1] == file for file in files), "a file does not end where the next begins"
    text = example.Text(torch.arange(100).to(torch.uint8), torch.arange(100).div(6, rounding_mode="floor"))
    x, y, file = example.batch(text, 7, 9, torch.Generator().manual_seed(0), "cpu")
    assert x.shape == y.shape == (7, 9) and torch.equal(y, x + 1) and len(x[:, 0].unique()) > 3
    assert torch.equal(file, x.div(6, rounding_mode="floor"))


def check_window_and_files(example):
    """A character's logits depend on those of its window and its file, and on no other."""
    torch.manual_seed(0)
    model = example.Transformer(layers=1, heads=2, dim=32, length=40, dropout=0.0, attention="flash", window=4).eval()
    characters, file = torch.randint(128, (1, 20)), torch.tensor([[0] * 7 + [1] * 13])
    spans = example.spans_of_files(file)
    assert spans[0, 0].tolist() == [[0, 7]] * 7 + [[7, 20]] * 13
    for changed in range(20):
        other = characters.clone()
        other[0, changed] = (other[0, changed] + 1) % 128
        differs = (model(characters, spans=spans) != model(other, spans=spans)).any(-1)[0]
        expected = [changed <= i <= changed + 4 and file[0, i] == file[0, changed] for i in range(20)]
        assert differs.tolist() == expected, f"character {changed}"


def check_dtype(example, tmp_path):
    """bfloat16: near the float32 losses, and not them."""
    half, single = (curves(example, tmp_path / dtype, "--steps", "30", "--dtype", dtype)["training"] for dtype in ("bfloat16", "float32"))
    assert 0 < max(abs(a - b) for a, b in zip(half, single, strict=True)) < 0.05


def check_compile(example, tmp_path, full):
    if not full:
        pytest.skip("compiling takes a minute: --full")
    compiled, plain = (curves(example, tmp_path / str(i), "--steps", "30", *more)["training"] for i, more in enumerate((["--compile"], [])))
    assert max(abs(a - b) for a, b in zip(compiled, plain, strict=True)) < 1e-3


def check_help():
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], check=True, capture_output=True, text=True).stdout
    named = set(re.findall(r"--\w+", text))
    assert {"--attention", "--preset", "--dtype", "--device", "--compile", "--resume", "--out"} <= named


if __name__ == "__main__":
    run_alone(__file__)
