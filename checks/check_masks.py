"""Masks: every kind, causal or not, lengths unequal either way; rows that attend nothing; nothing leaks through a mask.

python checks/check_masks.py [--backend reference]
"""

from dataclasses import replace

import pytest
import torch
from harness import (
    HALF,
    MASKS,
    Case,
    Problem,
    Report,
    against_truth,
    dtype_served,
    flash,
    half_served,
    naive,
    run_alone,
    skip_unless_masks,
    skip_unless_served,
)

from flash_attention import flash_attention
from flash_attention.reference import (
    flash_attention_backward,
    flash_attention_causal_backward,
    flash_attention_causal_forward,
    flash_attention_forward,
)

CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("general", "causal"))


# More rows or columns than the reference's largest tile has; one key/value head for both query heads.
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("Nq", "Nk"), [(1060, 530), (530, 1060)])
@CAUSAL
def check_kinds(target, causal, Nq, Nk, kind):
    against_truth(Case(Nq=Nq, Nk=Nk, H=2, Hkv=1, D=16, causal=causal, mask=kind, dtype=dtype_served(target)), target)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ("left padding", "dead rows", "sparse"))
@CAUSAL
def check_kinds_in_half_types(target, causal, kind, dtype):
    against_truth(Case(Nq=290, Nk=530, H=4, Hkv=2, D=16, causal=causal, mask=kind, dtype=dtype), target)


LARGE = [(D, kind, 0.0) for D in (64, 128, 192, 256) for kind in ("structured", "band")]
LARGE += [(D, "structured", 0.25) for D in (64, 192)]
LARGE += [(64, kind, 0.0) for kind in ("specks", "left padding", "dead rows", "heads share", "key", "nothing")]


@pytest.mark.parametrize(("D", "kind", "dropout_p"), LARGE)
@CAUSAL
def check_large(target, causal, D, kind, dropout_p):
    """So many tiles that a kernel scans the mask for tiles that it hides entirely."""
    if target.device != "cuda":
        pytest.skip("takes too long without a GPU; check_emulated.py has smaller ones")
    case = Case(B=4, H=8, Hkv=4, Nq=2048, Nk=2000, D=D, causal=causal, mask=kind, dropout_p=dropout_p, dtype=half_served(target))
    skip_unless_served(target, *case.inputs(target.device))
    against_truth(case, target)


@CAUSAL
def check_large_views(target, causal):
    """The same through strides: what is broadcast, transposed, or starts at an odd column."""
    if target.device != "cuda":
        pytest.skip("takes too long without a GPU")
    case = Case(B=4, H=8, Hkv=4, Nq=1999, Nk=2047, D=64, causal=causal, dtype=half_served(target))
    q, k, v, _ = case.inputs(target.device)
    B, H, Nq, Nk = case.B, case.H, case.Nq, case.Nk
    full = MASKS["structured"](B, H, 2100, 2100, torch.Generator().manual_seed(5)).to(target.device)
    skip_unless_served(target, q, k, v, full[..., :Nq, :Nk])
    views = {
        "batches expanded": full[:1, :, :Nq, :Nk].expand(B, H, Nq, Nk),
        "heads expanded": full[:, :1, :Nq, :Nk].expand(B, H, Nq, Nk),
        "batches and heads expanded": full[:1, :1, :Nq, :Nk],
        "rows expanded": full[:, :, 1000:1001, :Nk].expand(B, H, Nq, Nk),
        "columns expanded": full[..., :Nq, 1000:1001].expand(B, H, Nq, Nk),
        "transposed": full[..., :Nk, :Nq].mT,
        "odd start": full[..., 3 : 3 + Nq, 1 : 1 + Nk],
    }
    report = Report(f"{target}: {case}")
    dO = case.gradient(target.device, B, H, Nq, case.D)
    for what, mask in views.items():
        want = Problem.solve(case, q, k, v, mask.expand(B, H, Nq, Nk), dO, None)
        report.expect(what, flash(case, target, q, k, v, mask, dO), want)
    report.verdict()


def views(B: int, H: int, Nq: int, Nk: int, device: str) -> dict[str, torch.Tensor]:
    """Masks with unusual strides."""
    side = 2 * max(Nq, Nk) + 5  # odd: whether rows begin at multiples of 16 bytes is for check_aligned_rows
    full = (torch.rand(B, H, side, side, generator=torch.Generator().manual_seed(5)) < 0.6).to(device)
    return {
        "transposed": full[..., :Nk, :Nq].mT,
        "every second column": full[..., :Nq, : 2 * Nk : 2],
        "every second row": full[..., : 2 * Nq : 2, :Nk],
        "odd start": full[..., 3 : 3 + Nq, 1 : 1 + Nk],
        "heads outside batches": full.transpose(0, 1).contiguous().transpose(0, 1)[..., :Nq, :Nk],
        "batches expanded": full[:1, :, :Nq, :Nk].expand(B, H, Nq, Nk),
        "heads expanded": full[:, :1, :Nq, :Nk].expand(B, H, Nq, Nk),
        "rows expanded": full[:, :, :1, :Nk].expand(B, H, Nq, Nk),
        "columns expanded": full[..., :Nq, :1].expand(B, H, Nq, Nk),
        "one diagonal for all rows": full[0, 0].flatten()[: Nq + Nk].as_strided((B, H, Nq, Nk), (0, 0, 1, 1)),
        "key mask, every second": full[:, 0, 0, : 2 * Nk : 2],
    }


@CAUSAL
def check_strides(target, causal, repeatable):
    """A mask is read through its strides: bitwise what its contiguous copy gives."""
    skip_unless_masks(target)
    case = Case(Nq=290, Nk=530, D=16, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    for what, mask in views(case.B, case.H, case.Nq, case.Nk, target.device).items():
        before = mask.clone()
        got = replace(problem, mask=mask).answer(target)
        dense = before[:, None, None] if before.dim() == 2 else before
        want = replace(problem, mask=dense.expand(case.B, case.H, case.Nq, case.Nk).contiguous()).answer(target)
        for name, x, y in zip(got._fields, got, want, strict=True):
            assert torch.equal(x, y), f"mask with {what}, strides {mask.stride()}: {name} differs from the contiguous mask's"
        assert torch.equal(mask, before), f"mask with {what} was written to"


@pytest.mark.parametrize("D", (16, 64, 96, 128, 256))
@CAUSAL
def check_aligned_rows(target, causal, D):
    """One mask per head, with rows that begin at multiples of 16 bytes: a kernel may read 16 columns at a time, but not beyond the end."""
    skip_unless_masks(target)
    report = Report(f"{target}: rows of the mask at multiples of 16 bytes, D {D}")
    dtype = half_served(target) if target.device == "cuda" else torch.float32
    for Nq, Nk in ((1, 16), (130, 299), (200, 304), (333, 64), (129, 1025)):
        case = Case(H=4, Hkv=2, Nq=Nq, Nk=Nk, D=D, causal=causal, dtype=dtype)
        q, k, v, _ = case.inputs(target.device)
        skip_unless_served(target, q, k, v)
        wide = torch.rand(case.B, case.H, Nq, 32 + (Nk + 15) // 16 * 16, generator=torch.Generator().manual_seed(8)).to(target.device) < 0.6
        mask = wide[..., 16 : 16 + Nk]
        dO = case.gradient(target.device, case.B, case.H, Nq, D)
        want = Problem.solve(case, q, k, v, mask, dO, None)
        report.expect(str(case), flash(case, target, q, k, v, mask, dO), want)
    report.verdict()


@pytest.mark.parametrize("D", (64, 128))
@CAUSAL
def check_low_scores(target, causal, D):
    """All scores far below 0: a column beyond the end, whose score would be 0, must not get exp(300) times the weight."""
    report = Report(f"{target}: scores about −300, D {D}")
    for kind in ("full", "key", None):
        case = Case(Nq=200, Nk=203, D=D, causal=causal, mask=kind, dtype=dtype_served(target))
        q, k, v, mask = case.inputs(target.device)
        q, k = (q / 64 - 6).abs(), (k / 64 - 6).abs() * -(D**-0.5) * 8
        problem = Problem.of(case, target, inputs=(q, k, v, mask))
        report.expect(str(case), problem.answer(target), problem)
    report.verdict()


@CAUSAL
def check_shapes(target, causal, repeatable):
    """Every shape that a mask may be given in means the (B, H, Nq, Nk) mask that it broadcasts to: bitwise the same result."""
    skip_unless_masks(target)
    B, H, Nq, Nk = 3, 2, 40, 70
    problem = Problem.of(Case(B=B, H=H, Nq=Nq, Nk=Nk, D=16, causal=causal, dtype=dtype_served(target)), target)
    shapes = [(Nk,), (1, Nk), (Nq, 1), (Nq, Nk), (H, 1, Nk), (H, Nq, Nk), (B, 1, 1, Nk), (B, 1, Nq, 1), (1, H, Nq, Nk), (1, 1, 1, 1), (1,)]
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(6)).to(target.device) < 0.6 for shape in shapes]
    pairs = [(mask, mask.expand(B, H, Nq, Nk).contiguous()) for mask in masks]
    key_mask = masks[6][:, 0, 0, :]
    pairs.append((key_mask, pairs[6][1]))
    for mask, full in pairs:
        got, want = (replace(problem, mask=m).answer(target) for m in (mask, full))
        for name, x, y in zip(got._fields, got, want, strict=True):
            assert torch.equal(x, y), (
                f"mask of shape {tuple(mask.shape)}: {name} differs from that of the mask broadcast to {(B, H, Nq, Nk)}"
            )


def check_square_key_mask(target):
    """(B, Nk) is a key mask even where Nq = B and (Nq, Nk) would fit too."""
    skip_unless_masks(target)
    case = Case(B=5, Nq=5, Nk=9, D=16, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(7)).to(target.device) < 0.6
    got, keys, rows = (replace(problem, mask=m).answer(target).O for m in (mask, mask[:, None, None], mask[None, None]))
    assert torch.equal(got, keys), "a (B, Nk) mask was not read as a key mask"
    assert not torch.equal(got, rows), "this check cannot tell a key mask from a (Nq, Nk) mask"


@CAUSAL
def check_all_true(target, causal):
    """A mask that allows everything equals no mask."""
    skip_unless_masks(target)
    case = Case(Nq=290, Nk=530, D=16, causal=causal, dtype=dtype_served(target))
    problem = Problem.of(case, target)
    report = Report(f"{target}: all True, {case}")
    for shape in ((2, 530), (1, 1, 290, 530), (2, 2, 290, 530)):
        mask = torch.ones(shape, dtype=torch.bool, device=target.device)
        report.expect(f"mask {shape}", replace(problem, mask=mask).answer(target), problem)
    report.verdict()


DEAD = {
    "dead rows": Case(Nq=300, Nk=530, mask="dead rows"),
    "dead rows, causal": Case(Nq=300, Nk=530, mask="dead rows", causal=True),
    "causal with more rows than columns": Case(Nq=530, Nk=120, causal=True),
    "nothing": Case(Nq=70, Nk=90, mask="nothing"),
    "left padding, causal": Case(Nq=300, Nk=300, mask="left padding", causal=True, seed=3),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", DEAD.values(), ids=DEAD)
def check_rows_that_attend_nothing(target, case, dtype):
    """O = 0, LSE = −inf and zero gradients, exactly, in naive attention and in every algorithm; nothing is NaN anywhere."""
    case = replace(case, D=16, Dv=8, dtype=dtype)
    problem = Problem.of(case, target)
    q, k, v, mask, dO = problem.q, problem.k, problem.v, problem.mask, problem.dO
    allowed = torch.ones(case.B, case.H, case.Nq, case.Nk, dtype=torch.bool, device=target.device)
    allowed = allowed.tril(case.Nk - case.Nq) if case.causal else allowed
    if mask is not None:
        allowed = allowed & (mask[:, None, None] if mask.dim() == 2 else mask)
    dead, unseen = ~allowed.any(-1), ~allowed.any(-2)  # rows (B, H, Nq) that attend nothing, columns (B, H, Nk) that no row attends to
    assert dead.any(), "this case has no row that attends nothing"

    forward = flash_attention_causal_forward if case.causal else flash_attention_forward
    backward = flash_attention_causal_backward if case.causal else flash_attention_backward
    O, l, m = forward(q, k, v, mask)
    first_paper = (O, torch.where(l > 0, m + l.log(), -torch.inf), *backward(q, k, v, mask, O, l, m, dO))
    results = {
        "naive": naive(case, q, k, v, mask, dO, problem.dLSE),
        "FlashAttention, Alg. 1 and 4": first_paper,
        "flash_attention": problem.answer(target),
        "flash_attention without dLSE": flash(case, target, q, k, v, mask, dO),
    }
    for what, (O, LSE, dQ, dK, dV) in results.items():
        for name, x in (("O", O), ("dQ", dQ), ("dK", dK), ("dV", dV)):
            assert x.isfinite().all(), f"{what}: {name} holds NaN or infinity"
        assert not O[dead].any(), f"{what}: O is not 0 in rows that attend nothing, but up to {O[dead].abs().max()}"
        assert torch.equal(LSE.isneginf(), dead), (
            f"{what}: LSE is −inf in {int(LSE.isneginf().sum())} rows, not in the {int(dead.sum())} dead"
        )
        assert not LSE.isnan().any(), f"{what}: LSE holds NaN"
        for name, x, zero in (("dQ", dQ, dead), ("dK", dK, unseen), ("dV", dV, unseen)):
            assert not x[zero].any(), f"{what}: {name} is not 0 where nothing is attended, but up to {x[zero].abs().max()}"


HIDING = [(True, None), (True, "left padding"), (True, "full"), (False, "left padding"), (False, "full")]


@pytest.mark.parametrize(("causal", "kind"), HIDING, ids=lambda x: {True: "causal", False: "general"}.get(x, x))
def check_no_leak(target, causal, kind):
    """Keys and values that a row may not see do not affect it: changing them leaves its output unchanged, bit for bit, and they get no
    gradient.

    With left padding and causality, implementations that fill masked scores with a number and exponentiate it leak the future.
    """
    case = Case(Nq=290, Nk=530, H=1, D=16, causal=causal, mask=kind, dtype=dtype_served(target), seed=4)
    problem = Problem.of(case, target)
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    allowed = torch.ones(case.B, 1, case.Nq, case.Nk, dtype=torch.bool, device=target.device)
    allowed = allowed.tril(case.Nk - case.Nq) if causal else allowed
    if mask is not None:
        allowed = allowed & (mask[:, None, None] if mask.dim() == 2 else mask)
    assert not allowed.all(), "this case hides nothing"
    O = problem.answer(target).O
    for row in (0, 1, 100, 255, 256, 288, 289):
        hidden = ~allowed[:, :, row, :, None]  # (B, 1, Nk, 1)
        other_k, other_v = (torch.where(hidden, 50 * x.flip(-2) + 3, x) for x in (k, v))
        other = flash_attention(q, other_k, other_v, mask, causal=causal, backend=target.backend)
        assert torch.equal(O[:, :, row], other[:, :, row]), f"row {row} changes with keys and values that it may not see"
        dO = torch.zeros_like(problem.dO)
        dO[:, :, row] = problem.dO[:, :, row]
        for name, gradient in zip(("dK", "dV"), flash(case, target, q, k, v, mask, dO)[3:], strict=True):
            assert not (gradient * hidden).any(), f"row {row}: {name} is not 0 where the row may not see"


if __name__ == "__main__":
    run_alone(__file__)
