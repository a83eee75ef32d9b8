"""The implementations behind `flash_attention()`, fastest first, and the choice between them.

A backend is a module with

    why_not(q, k, v, mask, causal, dropout_p) -> str | None     why it cannot serve this call, or None if it can
    forward(q, k, v, mask, seed, causal, scale, dropout_p) -> (O, LSE)
    backward(dO, dLSE, q, k, v, mask, O, LSE, seed, causal, scale, dropout_p) -> (dQ, dK, dV)

where mask is None or a (B, H, Nq, Nk) view, seed is None exactly when there is no dropout, and dLSE may be None. The reference also has a
second_backward, and its three functions take one argument more, the block_size of a call that sets it.
"""

import warnings

from torch import Tensor

from . import cuda, reference

BACKENDS = {**cuda.RUNGS, "reference": reference}
GROUPS = {"cuda": tuple(name for name, rung in cuda.RUNGS.items() if not rung.teaching)}  # a name that stands for the fastest of several
DEFAULT = (*GROUPS["cuda"], "reference")  # what None chooses from


def check_name(name: str | None) -> str | None:
    """The name, if it is one that `choose` takes.

    Raises:
        ValueError: there is no such backend.
    """
    if name is not None and not (isinstance(name, str) and (name in BACKENDS or name in GROUPS)):
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, (*BACKENDS, *GROUPS)))}, got {name!r}")
    return name


def choose(
    name: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    block_size: int | None = None,
) -> str:
    """The name in BACKENDS that serves this call: the one asked for, or else the first that can and pays.

    None on a CUDA device falls back to the reference if no kernel serves the call, and warns once for each reason.

    Raises:
        ValueError: there is no such backend, or its tiles are fixed and block_size is given.
        NotImplementedError: the backend asked for cannot serve the call; the message says why.
    """
    if name is None and q.device.type != "cuda":
        return "reference"
    check_name(name)
    if block_size is not None:
        if name not in (None, "reference"):
            raise ValueError(f"block_size sets the reference's tiles and backend {name!r} has its own, got block_size {block_size}")
        return "reference"
    reasons = []
    names = DEFAULT if name is None else GROUPS.get(name, (name,))
    for each in names:
        if len(names) > 1 and each in cuda.RUNGS and not cuda.RUNGS[each].pays(q, v, dropout_p):
            continue
        reason = BACKENDS[each].why_not(q, k, v, mask, causal, dropout_p)
        if reason is None:
            if reasons and name is None and each == "reference":
                warnings.warn(f"flash_attention runs on the slow reference: {'; '.join(reasons)}", stacklevel=4)
            return each
        reasons.append(f"{each}: {reason}")
    raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(reasons)}")
