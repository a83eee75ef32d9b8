"""Checks a contender before it is timed: against normal attention in float64, on the same inputs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs, visible_rows
from benchmarks.contenders import Contender, Runner
from flash_attention.reference import Dropout, Visible, normal_attention
from flash_attention.reference.tiles import broadcast_mask

# Normal attention is computed for all rows while its matrix has at most this many entries (256 MB in float64), else for three blocks of
# rows: the first, the last and some in the middle.
MOST_ENTRIES = 1 << 25
SEED = 1


class Check(NamedTuple):
    """The largest error of O, or of the worst of O, dQ, dK and dV relative to what is allowed for it."""

    of: str
    error: float
    tolerance: float
    rows: int  # how many of the q_len rows were compared

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def verify(contender: Contender, case: Case, inputs: Inputs) -> Check | None:
    """Compares a contender with the truth; None if that is impossible (PyTorch's dropout draws other random bits than the definition here).

    The tolerance is the field's rule, twice the error that normal attention makes in this dtype plus the noise floor
    2·max|(truth + 0.3 − 0.3) − truth|; but in float32 never less than 1e-6 of O's largest entry (or of 1) and 2e-6 of a gradient's, growing
    with √d beyond d = 128 as rounding in a sum of d products does, and in float64 1e-8 of that.
    """
    if case.dropout_p and contender.type != "flash":
        return None
    dtype = getattr(torch, case.dtype)
    pieces = _pieces(case)
    rows = torch.cat([torch.arange(piece.start, piece.stop, device=case.device) for piece in pieces])
    if case.backward:
        # dO is zero outside the compared rows: then dK and dV, which sum over all rows, can be compared too.
        dO = torch.zeros_like(inputs.dO)
        dO[:, :, rows] = inputs.dO[:, :, rows]
        inputs = inputs._replace(dO=dO)
    truth = _definition(case, inputs, pieces, torch.float64)
    direct = _definition(case, inputs, pieces, dtype)
    measured = _measured(contender, case, inputs, rows)

    unit = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 0) * max(1, (case.d / 128) ** 0.5)
    checks = []
    for name in truth:
        exact, rounded = truth[name], truth[name].to(dtype)
        noise = _largest(((rounded + 0.3) - 0.3) - rounded)
        least = unit * (max(1, _largest(exact)) if name == "O" else 2 * max(1e-3, _largest(exact)))
        tolerance = max(least, 2 * _largest(direct[name].double() - exact) + 2 * noise, 1e-30)
        checks.append(Check(name, _largest(measured[name].double() - exact), tolerance, len(rows)))
    return max(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error / check.tolerance)


def _pieces(case: Case) -> list[slice]:
    count = MOST_ENTRIES // (case.b * case.h * case.kv_len)
    if count >= case.q_len:
        return [slice(0, case.q_len)]
    size = max(1, count // 3)
    starts = sorted({0, (case.q_len - size) // 2, case.q_len - size})
    return [slice(start, start + size) for start in starts] if case.q_len >= 3 * size else [slice(0, size)]


class _DropoutBelow:
    """Dropout for a block of rows that begins at row `first`."""

    def __init__(self, dropout: Dropout, first: int):
        self.dropout, self.first = dropout, first

    def tile(self, i: slice, j: slice, dtype: torch.dtype) -> Tensor:
        return self.dropout.tile(slice(i.start + self.first, i.stop + self.first), j, dtype)


def _definition(case: Case, inputs: Inputs, pieces: list[slice], dtype: torch.dtype) -> dict[str, Tensor]:
    """O of these rows and, with a backward, dQ of these rows, dK and dV."""
    q, k, v = (x.detach().to(dtype).requires_grad_(case.backward) for x in inputs[:3])
    mask = broadcast_mask(inputs.mask, case.b, case.h, case.q_len, case.kv_len)
    dropout = Dropout(case.dropout_p, _seed(case), range(case.b), range(case.h)) if case.dropout_p else None
    bias = None if inputs.bias is None else inputs.bias.detach().to(dtype).requires_grad_(case.bias_gradient)
    outputs = []
    for rows in pieces:
        allowed = None if mask is None else mask[:, :, rows]
        seen = None if case.as_mask else visible_rows(case, inputs, rows)
        if seen is not None:
            allowed = seen if allowed is None else seen & allowed
        below = None if dropout is None else _DropoutBelow(dropout, rows.start)
        scored = {"softcap": case.softcap, "alibi": inputs.alibi}
        if bias is not None:
            scored["bias"] = bias if bias.shape[2] == 1 else bias[:, :, rows]
        if any(x is not None for x in scored.values()):
            scored["visible"] = Visible(rows.stop - rows.start, case.kv_len, diagonal=rows.start + case.kv_len - case.q_len)
        outputs.append(normal_attention(q[:, :, rows], k, v, allowed, dropout=below, **scored))
    O = torch.cat(outputs, 2)
    if not case.backward:
        return {"O": O}
    dO = torch.cat([inputs.dO[:, :, rows] for rows in pieces], 2).to(dtype)
    trained = (bias,) if case.bias_gradient else ()
    dQ, dK, dV, *dBias = torch.autograd.grad(O, (q, k, v, *trained), dO)
    found = {"O": O.detach(), "dQ": torch.cat([dQ[:, :, rows] for rows in pieces], 2), "dK": dK, "dV": dV}
    return found | ({"dBias": dBias[0]} if dBias else {})


def _measured(contender: Contender, case: Case, inputs: Inputs, rows: Tensor) -> dict[str, Tensor]:
    runner = Runner(contender, case, inputs)
    torch.manual_seed(SEED)
    with runner.context():
        O = runner.stages["forward"](None)
        if not case.backward:
            return {"O": O[:, :, rows]}
        dQ, dK, dV, *dBias = runner.stages["backward"](O)
    found = {"O": O.detach()[:, :, rows], "dQ": dQ[:, :, rows], "dK": dK, "dV": dV}
    return found | ({"dBias": dBias[0]} if dBias else {})


def _seed(case: Case) -> Tensor:
    """The dropout seed that flash_attention draws right after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device=case.device)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
