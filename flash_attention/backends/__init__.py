"""The implementations behind `flash_attention()`, fastest first, and the choice between them.

A backend is a module with

    why_not(q, k, v, mask, causal, dropout_p) -> str | None     why it cannot serve this call, or None if it can
    forward(q, k, v, mask, seed, causal, scale, dropout_p) -> (O, LSE)
    backward(dO, dLSE, q, k, v, mask, O, LSE, seed, causal, scale, dropout_p) -> (dQ, dK, dV)

where mask is None or a (B, H, Nq, Nk) view, seed is None exactly when there is no dropout, and dLSE may be None.
"""

from torch import Tensor

from . import reference

BACKENDS = {"reference": reference}


def choose(name: str | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> str:
    """The name in BACKENDS that serves this call: the one asked for, or else the first that can.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: the backend asked for cannot serve the call; the message says why.
    """
    if name is None:
        return next(each for each, backend in BACKENDS.items() if backend.why_not(q, k, v, mask, causal, dropout_p) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = BACKENDS[name].why_not(q, k, v, mask, causal, dropout_p)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}")
    return name
