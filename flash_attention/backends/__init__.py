"""The implementations behind `flash_attention()`, fastest first, and the choice between them.

A backend is a module or a rung with

    why_not(call) -> str | None     why it cannot serve this call, or None if it can
    plan(which, call)               what computes its FORWARD or BACKWARD, for tensors like the call's:

        forward(q, k, v, mask, spans, seed, bias=None, alibi=None) -> (O, LSE)
        backward(dO, dLSE, q, k, v, mask, spans, O, LSE, seed, bias=None, alibi=None) -> (dQ, dK, dV), and dBias if call.to_bias

where mask is None or a (B, H, Nq, Nk) view, spans None or a (B, H, Nq, 2) view, seed None exactly when there is no dropout, and dLSE may be
None; bias is (B or 1, H or 1, Nq or 1, Nk or 1) and alibi (B or 1, H). The reference also has a second_backward.
"""

import warnings
from collections.abc import Callable
from typing import Any

from flash_attention import build
from flash_attention.call import Call

from . import cuda, emulated, reference

BACKENDS: dict[str, Any] = {**cuda.RUNGS, "reference": reference, **emulated.RUNGS}
# A name that selects the fastest of several.
GROUPS = {"cuda": tuple(name for name, rung in cuda.RUNGS.items() if not rung.teaching)}
DEFAULT = (*GROUPS["cuda"], "reference")  # what None chooses from
# Names of rungs that were chosen, not requested: the group (None is ""), a slash, the rung. If such a rung's forward or backward cannot be
# built, another rung is chosen instead: every backward computes from the same O and LSE.
CHOSEN = {f"{group}/{name}": cuda.RUNGS[name] for group in ("", *GROUPS) for name in GROUPS["cuda"]}

_warned: set[str] = set()


def as_chosen(asked_for: str | None, name: str) -> str:
    """The name that an op is given: which backend to call, and whether another may replace it."""
    return name if name == asked_for or name not in cuda.RUNGS else f"{asked_for or ''}/{name}"


def no_gradients(backend) -> str | None:
    """Why a backend, one of BACKENDS' values, computes no gradients, or None."""
    why_no_backward = getattr(backend, "why_no_backward", None)
    return why_no_backward and why_no_backward()


def check_name(name: str | None) -> str | None:
    """The name, if it is one that `choose` takes.

    Raises:
        ValueError: there is no such backend.
    """
    if name is not None and not (isinstance(name, str) and (name in BACKENDS or name in GROUPS)):
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, (*BACKENDS, *GROUPS)))}, got {name!r}")
    return name


def choose(name: str | None, call: Call, which: int = cuda.FORWARD) -> str:
    """The name in BACKENDS that serves this call, or its backward: the one asked for, or else the first that serves it and is worthwhile.

    None on a CUDA device falls back to the reference if no kernel serves the call, and warns once for each reason. A kernel is built when
    it first runs. Where that has failed (`build.failures`), None and a group's name skip it, and warn once.

    Raises:
        ValueError: there is no such backend, or its tiles are fixed and block_size is given.
        NotImplementedError: the backend asked for cannot serve the call; the message says why.
    """
    block_size = call.settings.block_size
    if name is None and call.q.device.type != "cuda":
        return "reference"
    check_name(name)
    if block_size is not None:
        if name not in (None, "reference"):
            raise ValueError(f"block_size sets the reference's tiles and backend {name!r} has its own, got block_size {block_size}")
        return "reference"
    reasons: dict[str, list[str]] = {}  # reason → names of the backends that gave it
    unbuilt = False
    names = DEFAULT if name is None else GROUPS.get(name, (name,))
    for each in names:
        rung = cuda.RUNGS.get(each) if len(names) > 1 else None
        if rung is not None and not rung.worthwhile(call, which):
            continue
        reason = BACKENDS[each].why_not(call)
        if reason is None and rung is not None and build.failures:
            reason = rung.why_not_built(which, call)
            unbuilt |= reason is not None
        if reason is None:
            if unbuilt or (reasons and name is None and each == "reference"):
                _warn(each, _listed(reasons), once=unbuilt)
            return each
        reasons.setdefault(reason, []).append(each)
    raise NotImplementedError(f"backend {name!r} cannot serve this call: {_listed(reasons)}")


def resolve(which: int, call: Call):
    """The backend of a call whose settings name it. A compiled graph leaves the choice to the op: an empty name means the fastest, "cuda"
    the fastest kernel, and a rung's own name is refused here if it cannot serve the call. An earlier choice (`as_chosen`) is revised
    only where kernels could not be built, and for a backward that another rung computes faster.

    Raises: as `choose`.
    """
    name = call.settings.backend
    # Where few queries have a forward of their own, another rung's backward may be the fastest.
    if name in CHOSEN and not build.failures and (which == cuda.FORWARD or CHOSEN[name].worthwhile(call, which)):
        return CHOSEN[name]
    return BACKENDS[choose(name.split("/")[0] or None, call, which)]


def plan(which: int, call: Call) -> Callable:
    """The plan of the call's forward or backward."""
    try:
        return resolve(which, call).plan(which, call)
    except build.BuildError:  # the failure is now recorded: `choose` skips the rung, and a rung requested by name raises again
        return resolve(which, call).plan(which, call)


def _listed(reasons: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def _warn(name: str, reasons: str, once: bool) -> None:
    text = f"flash_attention runs on {'the slow reference' if name == 'reference' else name}: {reasons}"
    if not (once and text in _warned):
        _warned.add(text)
        warnings.warn(text, stacklevel=5)
