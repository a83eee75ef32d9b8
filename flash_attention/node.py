"""A plain call with gradients in C++ (node.cpp). The library is compiled in the background, and loaded once it is there.

Until then, and where it cannot be had, `autograd.PlainAttention` does the same in Python.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flash_attention import shortcut
from flash_attention.backends.cuda import BACKWARD, Backward, Forward
from flash_attention.backends.launch import Launch
from flash_attention.build import BuildError, log
from flash_attention.build import node as library
from flash_attention.call import Call, Settings

ops = torch.ops.flash_attention

attend: Callable  # (q, k, v, plan) → O, once the library is loaded
_implemented = torch.library.Library("flash_attention", "IMPL")
_lock = threading.Lock()
_loaded: bool | None = None  # None: it is not decided yet
_compiling: subprocess.Popen | None = None


def plan(forward: Forward, q: Tensor) -> Tensor | None:
    """A plain forward's plan for `attend`, which the forward keeps; None without the library, or if its launch is not one of CUDA."""
    if type(forward.launch) is Launch and (_loaded or (_loaded is None and _load())):
        forward.gradients.node = ops.plain_plan(q, forward.launch.packed(forward.workspace), json.dumps(forward.call.settings))
    return forward.gradients.node


def _load() -> bool | None:
    """Loads the library, if it is there: whether it is loaded now."""
    global _loaded, attend
    with _lock:
        try:
            if _loaded is None and (path := _find()):
                torch.ops.load_library(path)
                _implemented.impl("plain_backward", _backward, "CompositeImplicitAutograd")
                attend, _loaded = ops.plain.default, True
        except (BuildError, OSError) as error:
            _loaded = False
            log.warning("flash_attention: small calls with gradients take longer than they could, because Python launches them: %s", error)
    return _loaded


def _find() -> Path | None:
    """The library; None while it is being compiled, which starts here.

    By a process of its own that outlives this one: a program that ends sooner would start it each time anew, and never have the library.

    Raises:
        BuildError: it cannot be compiled.
    """
    global _compiling
    if _compiling is None:
        if found := library.find():
            return found
        program = f"import sys; sys.path[:] = {sys.path!r}; from {library.__name__} import main; main()"
        command = [sys.executable or "python3", "-c", program]
        _compiling = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    if _compiling.poll() is None:
        return None
    if found := library.find():
        return found
    raise BuildError(_compiling.communicate()[1].decode())


def _backward(dO: Tensor, q: Tensor, k: Tensor, v: Tensor, O: Tensor, LSE: Tensor, plan: Tensor, settings: str) -> tuple[Tensor, ...]:
    """dQ, dK and dV where node.cpp cannot compute them. If it can compute the next ones of tensors like these, the plan is told how."""
    call = Settings(*json.loads(settings))
    if not shortcut.is_eager_backward(q, k, v, dO):
        return ops.backward(dO, None, q, k, v, None, None, O, LSE, None, *call)[:3]
    backward = shortcut.plan(BACKWARD, Call.of(q, k, v, None, None, call, O, dO))
    # It copies dO where the kernels cannot read it.
    if isinstance(backward, Backward) and backward._replace(copied=(*backward.copied[:-1], False)).is_plain and LSE.is_contiguous():
        ops.plain_keep(plan, [dO, q, k, v, O, LSE], backward.launch.packed(backward.workspace))
    return backward(dO, None, q, k, v, None, None, O, LSE, None)
