"""Command lines: a request that a script cannot serve is refused by argparse, with exit code 2, before anything is computed; never by a
traceback.

python checks/check_arguments.py
"""

import importlib
import importlib.util
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from harness import run_alone, run_as_script, script_arguments

from flash_attention import command_line
from flash_attention.backends import BACKENDS, GROUPS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench.py, bench_causal.py and benchmarks are not installed


def module(name: str):
    """A script by its path or module name, imported once."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# Script → the function that parses its command line, from sys.argv.
SCRIPTS = {
    "checks/check_backward.py": lambda: script_arguments("a check"),
    "bench.py": lambda: module("bench").parse(causal=False),
    "bench_causal.py": lambda: module("bench").parse(causal=True),
    "benchmarks.cpu_targets": lambda: module("benchmarks.cpu_targets").main(),
    "benchmarks.gpu_targets": lambda: module("benchmarks.gpu_targets").main(),
    "benchmarks.tables": lambda: module("benchmarks.tables").main(),
    "checks/sanitize.py": lambda: module("checks/sanitize.py").main(),
    "examples/train_char_transformer.py": lambda: module("examples/train_char_transformer.py").parse(None),
}
CHECK, BENCH, TRAIN = "checks/check_backward.py", "bench.py --type all", "examples/train_char_transformer.py"
NOT_POSITIVE = ("0", "-1", "1.5", "x", "", "1_000", "99999999999")
NOT_A_PROBABILITY = ("1", "-0.1", "nan", "x")
NOT_ABOVE_0 = ("0", "-1", "nan", "inf", "x")
NO_DEVICE = ("cuda:99", "cuda:x", "cuda:-1", "meta", "cpu:1", "gpu", "", *(() if torch.cuda.is_available() else ("cuda",)))
NOT_WRITABLE = ("/dev/null/figures.json", ".", str(ROOT / "README.md" / "figures.json"))
# Script and the arguments that it needs → option → values that it must refuse.
REFUSED = {
    CHECK: {
        **dict.fromkeys(("--b", "--h", "--kv_heads", "--q_len", "--kv_len", "--d"), NOT_POSITIVE),
        "--dtype": ("float8", ""),
        "--backend": ("warp9", ""),
        "--device": NO_DEVICE,
        "--h 6 --kv_heads": ("4", "12"),
        "--kv_heads": ("2",),
        "--lengths": ("3",),
    },
    BENCH: {
        **dict.fromkeys(("--b", "--h", "--q_len", "--kv_len", "--d", "--threads", "--repeats"), NOT_POSITIVE),
        "--threads": (*NOT_POSITIVE, "100000"),
        "--dropout_p": NOT_A_PROBABILITY,
        "--device": NO_DEVICE,
        "--json": NOT_WRITABLE,
        "--sweep --plot": (*NOT_WRITABLE, "sweep.svg"),
        "--mask": ("left",),
        "--dtype": ("int8",),
        "--backend": ("warp9",),
        "--plot": ("sweep.png",),
        "--sweep --q_len": ("100",),
        "--sweep --kv_len": ("256",),
    },
    "bench_causal.py": {"--type": ("fast", "")},
    "bench.py": {"--type": ("fast",), "--type sdpa --backend": ("reference",)},
    "benchmarks.cpu_targets": {"--json": NOT_WRITABLE, "--quick": ("yes",)},
    "benchmarks.gpu_targets": {"--device": (*NO_DEVICE, "cpu"), "--quick --device cpu --json": NOT_WRITABLE, "--only": ("everything",)},
    "benchmarks.tables": {"--check": ("README.md",)},
    "checks/sanitize.py": {"--backend": ("warp9", "reference"), "--tool": ("valgrind",), "--grid": ("warp9",)},
    TRAIN: {
        **dict.fromkeys(("--layers", "--heads", "--dim", "--length", "--batch", "--steps"), NOT_POSITIVE),
        **dict.fromkeys(("--checkpoint_every", "--validate_every"), NOT_POSITIVE),
        **dict.fromkeys(("--temperature", "--rate"), NOT_ABOVE_0),
        "--dropout": NOT_A_PROBABILITY,
        "--seed": ("-1", "1.5", "x", str(2**63)),
        "--device": NO_DEVICE,
        "--out": ("/dev/null", "/dev/null/run", str(ROOT / "README.md")),
        "--prompt": ("", 200 * "x"),
        "--heads": ("3",),
        "--preset": ("tpu", *(() if torch.cuda.is_available() else ("gpu",))),
        "--attention": ("sparse",),
        "--dtype": ("float16",),
    },
}
if torch.cuda.is_available():
    REFUSED[f"{TRAIN} --preset gpu"] = {"--device": ("cpu",), "--batch 1 --length": ("2048",)}


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [(script, option, value) for script in REFUSED for option in REFUSED[script] for value in REFUSED[script][option]],
)
def check_refused(script, option, value, monkeypatch, capsys):
    name, *needed = script.split()
    monkeypatch.setattr(sys, "argv", [name, *needed, *option.split(), value])
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[name]()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "usage:" in said and "error: " in said, said
    named = [word for word in (*option.split(), "unrecognized arguments") if word in said.split("error: ")[1]]
    assert named, f"the message does not name the argument: {said}"


def check_sanitize_without_a_gpu(monkeypatch, capsys):
    """If nothing could be run, the script must not report success."""
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS["checks/sanitize.py"]()
    assert "needs a CUDA GPU" in capsys.readouterr().err


def check_sanitize_on_an_older_gpu(monkeypatch, capsys):
    """A rung that this GPU cannot run is refused by name, and is not among those that run by default."""
    script, asked = module("checks/sanitize.py"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    monkeypatch.setattr(script, "run_grid", asked.append)
    monkeypatch.setattr(script, "sanitize", lambda tool, backend: True)
    for arguments, code in (["--backend", "hopper"], 2), ([], 0):
        monkeypatch.setattr(sys, "argv", ["sanitize.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            script.main()
        assert caught.value.code == code
    assert "hopper does not run on a GPU of compute capability 8.0" in capsys.readouterr().err
    assert "tensor_core" in asked and "hopper" not in asked


@pytest.mark.parametrize("name", (None, *BACKENDS, *GROUPS))
def check_backends_taken(name, monkeypatch):
    """The scripts accept every backend name that `flash_attention()` accepts."""
    asked = [] if name is None else ["--backend", name]
    for script, needed in ((CHECK, []), ("bench.py", ["--type", "flash"])):
        monkeypatch.setattr(sys, "argv", [script, *needed, *asked])
        assert SCRIPTS[script]().backend == name


@pytest.mark.parametrize("name", GROUPS)
def check_backend_that_does_not_serve(name, monkeypatch, capsys):
    """On a CPU no kernel serves a call: checks and benches print the reason and exit with 2. Exit code 1 would mean a wrong result."""
    from check_forward import compare

    monkeypatch.setattr(
        sys, "argv", ["check_forward.py", "--backend", name, "--device", "cpu", "--q_len", "20", "--kv_len", "20", "--d", "8"]
    )
    with pytest.raises(SystemExit) as caught:
        run_as_script(compare, script_arguments("a check"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("check_forward.py: error: backend") and "Traceback" not in said, said
    monkeypatch.setattr(sys, "argv", ["bench.py", "--type", "flash", "--backend", name, "--device", "cpu", "--q_len", "20", "--d", "8"])
    assert module("bench").main() == 2
    assert "bench.py: error: backend" in capsys.readouterr().err


def check_exit_codes(monkeypatch, capsys):
    """Exit code 1 if results differ, 2 if the script raises, 0 otherwise."""
    monkeypatch.setattr(sys, "argv", ["check_forward.py", "--device", "cpu"])
    arguments = script_arguments("a check")

    def fails(case, target):
        raise AssertionError("off by 1")

    for check, code in ((lambda case, target: None, 0), (fails, 1), (lambda case, target: [][1], 2)):
        with pytest.raises(SystemExit) as caught:
            run_as_script(check, arguments)
        assert caught.value.code == code
    assert "IndexError" in capsys.readouterr().err


def check_whole_process():
    """A script run as a process: exit code 2 and no traceback. pytest with an unknown backend must fail, not pass with no checks."""
    run = subprocess.run(
        [sys.executable, "checks/check_backward.py", "--kv_heads", "0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and "argument --kv_heads: must be a whole number from 1" in run.stderr, run.stderr
    run = subprocess.run(
        [sys.executable, "checks/check_grid.py", "--backend", "warp9"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0 and "--backend must be one of" in run.stderr, run.stdout + run.stderr


def check_values_taken(tmp_path, monkeypatch):
    """The types accept every value that a script can serve; an output may lie in folders that do not exist yet, or replace a file."""
    monkeypatch.chdir(tmp_path)
    assert [command_line.positive(text) for text in ("1", "007", "2147483647")] == [1, 7, 2147483647]
    assert command_line.seed("0") == 0 and command_line.seed(str(2**63 - 1)) == 2**63 - 1
    assert command_line.probability("0") == 0 and command_line.probability(".999") == 0.999
    assert command_line.positive_number("1e-3") == 1e-3
    assert command_line.device("cpu") == "cpu"
    (tmp_path / "old.json").write_text("{}")
    for text in ("new.json", "old.json", "a/b/new.json", str(tmp_path / "c" / "new.json"), "../" + tmp_path.name + "/new.json"):
        assert command_line.output_file(text) == Path(text)
    assert command_line.output_folder(".") == Path(".") and command_line.output_folder("a/b") == Path("a/b")
    assert {path.name for path in tmp_path.iterdir()} == {"old.json"}, "asking leaves nothing behind"
    with pytest.raises(ArgumentTypeError, match="cannot be written"):
        command_line.output_file("old.json/new.json")


if __name__ == "__main__":
    run_alone(__file__)
