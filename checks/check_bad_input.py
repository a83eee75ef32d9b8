"""Wrong arguments raise the right type of error, before anything runs, and the message names what is at fault.

python checks/check_bad_input.py [--backend reference]
"""

import math

import numpy
import pytest
import torch
from harness import ALGORITHMS, call_of, half_served, run_alone

from flash_attention import backends, flash_attention
from flash_attention.backends import BACKENDS, choose, cuda, libraries
from flash_attention.backends.cuda import BACKWARD, FORWARD

B, H, Nq, Nk, D = 2, 4, 5, 7, 16


def tensor(*shape: int, dtype=torch.float16, device=None) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)  # float16 and D = 16: nearly every backend serves them


GOOD = {"q": (B, H, Nq, D), "k": (B, H, Nk, D), "v": (B, H, Nk, D)}
# What is wrong → what replaces the good arguments, the error, words that its message must have.
BAD = {
    "q has 3 dimensions": ({"q": tensor(H, Nq, D)}, ValueError, ["q ", "4 dimensions", "(4, 5, 16)"]),
    "k has 5 dimensions": ({"k": tensor(1, B, H, Nk, D)}, ValueError, ["k ", "4 dimensions", "(1, 2, 4, 7, 16)"]),
    "v is a scalar": ({"v": tensor()}, ValueError, ["v ", "4 dimensions", "()"]),
    "q is a numpy array": ({"q": numpy.zeros((B, H, Nq, D))}, TypeError, ["q ", "torch.Tensor", "ndarray"]),
    "k is a list": ({"k": [1.0]}, TypeError, ["k ", "torch.Tensor", "list"]),
    "v is None": ({"v": None}, TypeError, ["v ", "torch.Tensor", "NoneType"]),
    "q is int64": ({"q": tensor(B, H, Nq, D, dtype=torch.int64)}, TypeError, ["q ", "float16", "torch.int64"]),
    "k is bool": ({"k": tensor(B, H, Nk, D, dtype=torch.bool)}, TypeError, ["k ", "float16", "torch.bool"]),
    "v is complex": ({"v": tensor(B, H, Nk, D, dtype=torch.complex64)}, TypeError, ["v ", "float16", "torch.complex64"]),
    "q is float8": ({"q": tensor(B, H, Nq, D, dtype=torch.float8_e4m3fn)}, TypeError, ["q ", "float16", "torch.float8_e4m3fn"]),
    "q is nested": ({"q": torch.nested.nested_tensor([tensor(H, n, D) for n in (3, 5)])}, TypeError, ["q ", "dense", "nested"]),
    "k is jagged": (
        {"k": torch.nested.nested_tensor([tensor(n, H, D) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)},
        TypeError,
        ["k ", "dense", "nested", "torch.jagged"],
    ),
    "v is sparse": ({"v": tensor(B, H, Nk, D).to_sparse()}, TypeError, ["v ", "dense", "torch.sparse_coo"]),
    "mixed dtypes": (
        {"k": tensor(B, H, Nk, D, dtype=torch.bfloat16)},
        TypeError,
        ["one dtype", "torch.float16, torch.bfloat16 and torch.float16"],
    ),
    "batches differ": ({"q": tensor(3, H, Nq, D)}, ValueError, ["batch", "(3, 4, 5, 16)", "(2, 4, 7, 16)"]),
    "batch of 1 is not broadcast": ({"q": tensor(1, H, Nq, D)}, ValueError, ["batch", "(1, 4, 5, 16)", "(2, 4, 7, 16)"]),
    "heads do not divide": (
        {"k": tensor(B, 3, Nk, D), "v": tensor(B, 3, Nk, D)},
        ValueError,
        ["heads", "divide", "(2, 4, 5, 16)", "(2, 3, 7, 16)"],
    ),
    "more key heads than query heads": (
        {"k": tensor(B, 8, Nk, D), "v": tensor(B, 8, Nk, D)},
        ValueError,
        ["heads", "divide", "(2, 4, 5, 16)", "(2, 8, 7, 16)"],
    ),
    "k and v have other heads": ({"v": tensor(B, 2, Nk, D)}, ValueError, ["k and v", "heads", "(2, 4, 7, 16)", "(2, 2, 7, 16)"]),
    "k and v have other lengths": ({"v": tensor(B, H, 8, D)}, ValueError, ["k and v", "length", "(2, 4, 7, 16)", "(2, 4, 8, 16)"]),
    "q and k have other head sizes": ({"q": tensor(B, H, Nq, 24)}, ValueError, ["q and k", "head size", "(2, 4, 5, 24)", "(2, 4, 7, 16)"]),
    "head size 0": ({"q": tensor(B, H, Nq, 0), "k": tensor(B, H, Nk, 0)}, ValueError, ["head size", "0", "(2, 4, 5, 0)"]),
    "value size 0": ({"v": tensor(B, H, Nk, 0)}, ValueError, ["head size", "0", "(2, 4, 7, 0)"]),
    "no heads": ({"k": tensor(B, 0, Nk, D), "v": tensor(B, 0, Nk, D)}, ValueError, ["heads", "0", "(2, 0, 7, 16)"]),
    "k on another device": (
        {"k": tensor(B, H, Nk, D, device="meta")},
        ValueError,
        ["one device", "meta"],
    ),
    "mask on another device": ({"mask": torch.ones(B, Nk, dtype=torch.bool, device="meta")}, ValueError, ["mask", "one device", "meta"]),
    "mask of floats": ({"mask": torch.zeros(Nq, Nk)}, TypeError, ["mask", "torch.bool", "torch.float32"]),
    "mask of ints": ({"mask": torch.ones(B, Nk, dtype=torch.int64)}, TypeError, ["mask", "torch.bool", "torch.int64", "mask.bool()"]),
    "mask of bytes": ({"mask": torch.ones(B, Nk, dtype=torch.uint8)}, TypeError, ["mask", "torch.bool", "torch.uint8"]),
    "mask is a list": ({"mask": [[True] * Nk] * Nq}, TypeError, ["mask", "list"]),
    "mask is a numpy array": ({"mask": numpy.ones((B, Nk), dtype=bool)}, TypeError, ["mask", "ndarray"]),
    "mask of another length": ({"mask": torch.ones(B, Nk + 1, dtype=torch.bool)}, ValueError, ["(2, 8)", "(2, 7)", "(2, 4, 5, 7)"]),
    "mask of queries": ({"mask": torch.ones(B, Nq, dtype=torch.bool)}, ValueError, ["(2, 5)", "(2, 7)", "(2, 4, 5, 7)"]),
    "mask (B, Nq, Nk)": ({"mask": torch.ones(B, Nq, Nk, dtype=torch.bool)}, ValueError, ["(2, 5, 7)", "(2, 4, 5, 7)"]),
    "mask transposed": ({"mask": torch.ones(B, H, Nk, Nq, dtype=torch.bool)}, ValueError, ["(2, 4, 7, 5)", "(2, 4, 5, 7)"]),
    "mask of another batch": ({"mask": torch.ones(3, H, Nq, Nk, dtype=torch.bool)}, ValueError, ["(3, 4, 5, 7)", "(2, 4, 5, 7)"]),
    "mask has 5 dimensions": ({"mask": torch.ones(1, B, H, Nq, Nk, dtype=torch.bool)}, ValueError, ["(1, 2, 4, 5, 7)", "(2, 4, 5, 7)"]),
    "empty mask": ({"mask": torch.ones(0, dtype=torch.bool)}, ValueError, ["(0,)", "(2, 4, 5, 7)"]),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, ["dropout_p", "[0, 1)", "-0.1"]),
    "dropout of everything": ({"dropout_p": 1.0}, ValueError, ["dropout_p", "[0, 1)", "1.0"]),
    "dropout beyond everything": ({"dropout_p": 50}, ValueError, ["dropout_p", "[0, 1)", "50"]),
    "dropout NaN": ({"dropout_p": math.nan}, ValueError, ["dropout_p", "[0, 1)", "nan"]),
    "dropout is a word": ({"dropout_p": "x"}, (TypeError, ValueError), ["dropout_p", "'x'"]),
    "dropout is None": ({"dropout_p": None}, (TypeError, ValueError), ["dropout_p", "None"]),
    "scale is a tensor": ({"scale": torch.tensor(0.5)}, TypeError, ["scale", "Tensor"]),
    "scale is complex": ({"scale": numpy.complex64(1)}, TypeError, ["scale", "complex"]),
    "scale is an array": ({"scale": numpy.ones(3)}, TypeError, ["scale", "ndarray"]),
    "scale is a NumPy bool": ({"scale": numpy.bool_(True)}, TypeError, ["scale", "bool"]),
    "scale is a word": ({"scale": "auto"}, TypeError, ["scale", "str"]),
    "causal is a tensor": ({"causal": torch.tensor(True)}, TypeError, ["causal", "tensor(True"]),
    "causal is a number": ({"causal": 1}, TypeError, ["causal", "1"]),
    "block of nothing": ({"block_size": 0}, ValueError, ["block_size", "at least 1", "0"]),
    "block of less than nothing": ({"block_size": -3}, ValueError, ["block_size", "at least 1", "-3"]),
    "block size is a word": ({"block_size": "64"}, TypeError, ["block_size", "'64'"]),
    "block size is a fraction": ({"block_size": 64.0}, TypeError, ["block_size", "64.0"]),
    "block size is a bool": ({"block_size": True}, TypeError, ["block_size", "True"]),
    "block size of kernels": ({"block_size": 64, "backend": "cuda"}, ValueError, ["block_size", "'cuda'", "64", "reference"]),
    "block size of a kernel": ({"block_size": 64, "backend": "simple"}, ValueError, ["block_size", "'simple'", "64", "reference"]),
    "block size of no backend": ({"block_size": 64, "backend": "warp9"}, ValueError, ["warp9", *map(repr, BACKENDS)]),
    "causal is a NumPy number": ({"causal": numpy.int64(1)}, TypeError, ["causal", "1"]),
    "causal is an array": ({"causal": numpy.ones(2, dtype=bool)}, TypeError, ["causal", "array"]),
    "unknown backend": ({"backend": "warp9"}, ValueError, ["warp9", *map(repr, BACKENDS)]),
    "backend is a number": ({"backend": 3}, (TypeError, ValueError), ["backend", "3"]),
}


@pytest.mark.parametrize(("wrong", "error", "words"), BAD.values(), ids=BAD)
def check_bad_input(target, wrong, error, words):
    def place(x):
        return x.to(target.device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x

    arguments = {name: tensor(*shape) for name, shape in GOOD.items()} | {"backend": target.backend} | wrong
    with pytest.raises(Exception) as caught:
        flash_attention(**{name: place(x) for name, x in arguments.items()})
    kinds = error if isinstance(error, tuple) else (error,)
    message = f"{type(caught.value).__name__}: {caught.value}"
    assert type(caught.value) in kinds, f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {message}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"the message does not name {missing}: {message}"


def check_good_input(target):
    """The call from which the wrong ones are made is valid, so that each fails for its own reason."""
    dtype = half_served(target)
    O = flash_attention(**{name: tensor(*shape, dtype=dtype).to(target.device) for name, shape in GOOD.items()}, backend=target.backend)
    assert O.shape == (B, H, Nq, D)
    assert O.dtype == dtype


@pytest.mark.parametrize("name", GOOD)
def check_autocast_with_a_double(target, name):
    """Autocast leaves float64 unchanged, as for torch's own attention: mixed with other dtypes it is an error, whichever tensor has it."""
    tensors = {each: tensor(*shape, dtype=torch.float32).to(target.device) for each, shape in GOOD.items()}
    tensors[name] = tensors[name].double()
    with torch.autocast(target.device, dtype=torch.bfloat16), pytest.raises(TypeError, match=r"one dtype.*torch\.float64"):
        flash_attention(**tensors, backend=target.backend)
    tensors = {each: x.double() for each, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(**{each: x.cpu() for each, x in tensors.items()}).dtype == torch.float64


def check_positional_options(target):
    """Options are keyword-only: a fifth positional argument is not silently taken for one of them."""
    with pytest.raises(TypeError):
        flash_attention(*(tensor(*shape).to(target.device) for shape in GOOD.values()), None, True)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("size", (0, -3))
def check_block_sizes(algorithm, size):
    q, k, v = (tensor(*shape, dtype=torch.float32) for shape in GOOD.values())
    O, *saved = algorithm.forward(q, k, v)
    for name in ("block_q", "block_k"):
        for call in (
            lambda **sizes: algorithm.forward(q, k, v, **sizes),
            lambda **sizes: algorithm.backward(q, k, v, None, O, *saved, O, **sizes),
        ):
            with pytest.raises(ValueError, match=rf"block size.*{size}"):
                call(**{name: size})


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def check_masks_of_the_algorithms(algorithm):
    """The papers' functions check the mask themselves."""
    q, k, v = (tensor(*shape, dtype=torch.float32) for shape in GOOD.values())
    with pytest.raises(TypeError, match=r"mask.*torch\.float32"):
        algorithm.forward(q, k, v, torch.ones(B, Nk))
    with pytest.raises(ValueError, match=r"\(2, 8\)"):
        algorithm.forward(q, k, v, torch.ones(B, Nk + 1, dtype=torch.bool))


def check_choice(monkeypatch):
    """Among the kernels that could serve a call, the highest worthwhile rung is chosen; one asked for by name is used."""
    monkeypatch.setattr(cuda.Rung, "why_not", lambda *call: None)
    few = {64: (128, 384), 72: (64, 192), 128: (64, 192), 136: (64, 256), 256: (64, 256)}  # rows by head size: without and with dropout
    for head_dim, limits in few.items():
        for dropout_p, limit in zip((0.0, 0.1), limits, strict=True):
            for rows, rung in ((1, "tensor_core"), (limit, "tensor_core"), (limit + 1, "hopper")):
                x = torch.empty(1, 1, rows, head_dim).expand(8, 64, -1, -1)
                assert choose("cuda", call_of(x, x, x, dropout_p=dropout_p), BACKWARD) == rung
                assert choose("hopper", call_of(x, x, x, dropout_p=dropout_p)) == "hopper"


def check_choice_by_head_size(monkeypatch):
    """On a GPU that can run all rungs, each head size uses the kernels with the closest compiled size."""
    monkeypatch.setattr(libraries, "why_no_kernels", lambda rung, device: None)
    monkeypatch.setattr(cuda.Rung, "device_type", "meta")
    for D, Dv, rung, compiled in (
        (40, 40, "hopper", (64, 64)),
        (72, 72, "hopper", (80, 80)),
        (96, 88, "hopper", (96, 96)),
        (112, 112, "hopper", (112, 112)),
        (136, 136, "hopper", (160, 160)),
        (192, 192, "hopper", (192, 192)),
        (192, 128, "hopper", (192, 128)),
        (200, 64, "hopper", (256, 256)),
        (264, 8, "hopper_wide", (320, 320)),
        (512, 512, "hopper_wide", (512, 512)),
        (510, 512, "simple", (512, 512)),
    ):
        q, k, v = (torch.empty(1, 1, 1000, d, dtype=torch.bfloat16, device="meta") for d in (D, D, Dv))
        for which in (FORWARD, BACKWARD):
            call = call_of(q, k, v)
            assert choose("cuda", call, which) == rung
            assert cuda.RUNGS[rung].compiled(call) == compiled


def check_choice_of_few_queries(monkeypatch):
    """One token, or a few, against a cache use split_keys; a chunk of a prompt, dropout and backwards do not."""
    monkeypatch.setattr(cuda.Rung, "why_not", lambda *call: None)
    for B, H, Hkv, Nq, Nk, D, few in (
        (1, 32, 8, 1, 8192, 128, True),
        (1, 32, 8, 64, 16384, 128, True),
        (64, 32, 8, 1, 4096, 128, True),
        (64, 32, 8, 32, 4096, 128, True),
        (64, 32, 8, 64, 4096, 128, False),
        (8, 32, 8, 512, 8192, 128, False),
        (1, 16, 16, 1, 32768, 64, True),
        (16, 8, 8, 128, 4096, 64, False),
        (1, 32, 8, 64, 16384, 256, True),
        (1, 32, 8, 128, 16384, 256, False),
        (16, 1, 1, 4096, 4096, 64, False),
    ):
        q, k = torch.empty(1, 1, 1, D).expand(B, H, Nq, D), torch.empty(1, 1, 1, D).expand(B, Hkv, Nk, D)
        case = B, H, Hkv, Nq, Nk, D
        assert (choose("cuda", call_of(q, k, k)) == "split_keys") == few, case
        assert choose("cuda", call_of(q, k, k, dropout_p=0.1)) != "split_keys", case
        assert choose("cuda", call_of(q, k, k), BACKWARD) != "split_keys", case
    q, k = torch.empty(1, 1, 1, 128).expand(64, 32, 64, 128), torch.empty(1, 1, 1, 128).expand(64, 8, 4096, 128)
    assert choose("cuda", call_of(q, k, k)) == "hopper"  # few rows, but many keys
    assert choose("cuda", call_of(q, k[:, :, :255], k[:, :, :255])) == "tensor_core"
    others = ({"dropout_p": 0.1}, {"window": (9, None)}, {"mask": torch.empty(1, dtype=torch.bool).expand(64, 32, 64, 4096)})
    assert all(choose("cuda", call_of(q, k, k, **each)) == "tensor_core" for each in others)
    assert choose("cuda", call_of(q, k, k), BACKWARD) == "tensor_core"
    settings = call_of(q, k, k).settings._replace(backend="cuda/hopper")
    assert backends.resolve(FORWARD, call_of(q, k, k)._replace(settings=settings)).name == "hopper"
    assert backends.resolve(BACKWARD, call_of(q, k, k)._replace(settings=settings)).name == "tensor_core"
    q = torch.empty(1, 32, 1, 64)
    settings = call_of(q, q, q).settings._replace(backend="/split_keys")
    assert backends.resolve(FORWARD, call_of(q, q, q)._replace(settings=settings)).name == "split_keys"
    monkeypatch.setattr(backends, "DEFAULT", backends.GROUPS["cuda"])
    settings = settings._replace(backend="cuda/split_keys")
    assert backends.resolve(BACKWARD, call_of(q, q, q)._replace(settings=settings)).name == "tensor_core"


@pytest.mark.parametrize("shape", [(0, 4, 5, 7), (2, 4, 0, 7), (2, 4, 5, 0), (2, 4, 0, 0), (0, 4, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))
def check_empty(target, causal, shape):
    """No batches, rows or columns is not an error: rows that attend nothing give O = 0 and LSE = −inf, and gradients have their shapes."""
    b, h, rows, columns = shape
    q, k, v = (tensor(b, h, n, D, dtype=half_served(target)).to(target.device).requires_grad_() for n in (rows, columns, columns))
    O, LSE = flash_attention(q, k, v, causal=causal, return_lse=True, backend=target.backend)
    assert O.shape == (b, h, rows, D)
    assert not O.any()
    assert LSE.shape == (b, h, rows)
    assert LSE.isneginf().all()
    for x, gradient in zip((q, k, v), torch.autograd.grad(O.sum(), (q, k, v)), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


if __name__ == "__main__":
    run_alone(__file__)
