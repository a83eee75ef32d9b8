"""Windows, spans and offsets: what a row sees. Every backend against naive attention under the equivalent dense mask, and
`reference/visible.py` against its own dense form.

python checks/check_visible.py [--backend reference]

One file because windows, spans and offsets are all compared with the same dense mask.
"""

from itertools import product

import pytest
import torch
from harness import SPANS, Case, Problem, against_truth, compilers, expect_error, run_alone, served
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev, vmap

from flash_attention import FlashAttention, flash_attention
from flash_attention.backends import BACKENDS
from flash_attention.backends import reference as reference_backend
from flash_attention.call import Settings
from flash_attention.reference import Dropout, Visible, flash2, normal_attention
from flash_attention.spans import chunks, documents, prefix

ops = torch.ops.flash_attention
LENGTHS = [(1, 1), (113, 203), (203, 113), (257, 300), (130, 130)]
WINDOWS = [(0, 0), (40, 0), (0, 17), (63, 64), (None, 5), (5, None), (1000, 1000)]


# ---- reference/visible.py


limits = st.one_of(st.none(), st.integers(0, 12))


@st.composite
def visibles(draw) -> Visible:
    Nq, Nk = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    spans = None
    if draw(st.booleans()):
        numbers = draw(st.lists(st.integers(-3, 12), min_size=4 * Nq, max_size=4 * Nq))
        spans = torch.tensor(numbers, dtype=torch.int32).view(2, 1, Nq, 2)
    return Visible(Nq, Nk, draw(limits), draw(limits), spans, draw(st.one_of(st.none(), st.integers(-12, 12))))


@settings(max_examples=300, deadline=None)
@given(visibles(), st.data())
def check_tiles_are_those_of_the_dense_mask(visible, data):
    """What a tile of rows sees, which rows see a tile of columns, what is seen whole, and parts: against the mask written out."""
    Nq, Nk = visible.Nq, visible.Nk
    dense = visible.dense(slice(0, Nq), slice(0, Nk)).flatten(0, 1)  # (1 or 2, Nq, Nk)
    a, b = sorted((data.draw(st.integers(0, Nq)), data.draw(st.integers(0, Nq))))
    c, d = sorted((data.draw(st.integers(0, Nk)), data.draw(st.integers(0, Nk))))
    i, j = slice(a, b), slice(c, d)
    columns, rows = visible.columns(i), visible.rows(j)
    outside_columns = torch.ones(Nk, dtype=torch.bool)
    outside_columns[columns] = False
    assert not dense[:, i][:, :, outside_columns].any()
    outside_rows = torch.ones(Nq, dtype=torch.bool)
    outside_rows[rows] = False
    assert not dense[:, outside_rows][:, :, j].any()
    if a < b and c < d:
        assert visible.whole(i, j) == bool(dense[:, i, j].all())
    if visible.spans is None and a < b:  # without spans the range is the least there is
        seen = dense[:, i].any(1).any(0).nonzero().flatten().tolist()
        assert (columns.start, columns.stop) == ((seen[0], seen[-1] + 1) if seen else (0, 0))
    part = visible.part(i, j)
    assert torch.equal(part.dense(slice(0, b - a), slice(0, d - c)).flatten(0, 1), dense[:, i, j])
    S = torch.zeros(2, 1, b - a, d - c)
    if a < b and c < d:
        assert torch.equal(visible.hide_(S, i, j)[:, 0].isneginf(), ~dense[:, i, j].expand(2, -1, -1))
    if not (dense.any(-1).all() if Nq else True):
        assert visible.blinds


def check_the_makers():
    """documents, prefix and chunks against masks made element by element."""
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        n, m = (torch.randint(0, 9, (6,), generator=random) * (torch.rand(6, generator=random) < 0.8) for _ in range(2))
        for causal, window in product((False, True), (None, (2, 1), (0, None))):
            left, right = window or (None, None)
            want = torch.block_diag(
                *(
                    Visible(a, b, left, 0 if causal else right).dense(slice(0, a), slice(0, b))[0, 0].float()
                    for a, b in zip(n.tolist(), m.tolist(), strict=True)
                )
            )
            spans = documents(n, m, causal=causal, window=window)
            got = Visible(int(n.sum()), int(m.sum()), spans=spans).dense(slice(0, int(n.sum())), slice(0, int(m.sum())))[0, 0]
            assert torch.equal(got, want.bool()[: int(n.sum()), : int(m.sum())])
            assert torch.equal(spans, documents(n.tolist(), m.tolist(), causal=causal, window=window))
    row, column = torch.arange(7)[:, None], torch.arange(9)
    dense = lambda spans, Nk: Visible(spans.shape[2], Nk, spans=spans).dense(slice(0, spans.shape[2]), slice(0, Nk))  # noqa: E731
    assert torch.equal(dense(prefix([3, 0], 7, 9), 9)[:, 0], (column < torch.tensor([3, 0])[:, None, None]) | (column <= row + 2))
    assert torch.equal(dense(chunks(3, 7), 7)[0, 0], row // 3 == row.mT // 3)
    assert torch.equal(dense(chunks(3, 7, before=1, causal=True), 7)[0, 0], (row // 3 - row.mT // 3 <= 1) & (row.mT <= row))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: documents([1.5]), TypeError, ["lengths", "integers", "float32"]),
        (lambda: documents([1, -1]), ValueError, ["lengths", "negative"]),
        (lambda: documents([1, 2], [3]), ValueError, ["1 and 2"]),
        (lambda: documents(torch.ones(2, 2, dtype=torch.int32)), ValueError, ["one-dimensional"]),
        (lambda: chunks(0, 5), ValueError, ["size 0"]),
    ],
)
def check_wrong_lengths(call, error, words):
    expect_error(call, error, words)


BAD = {
    "a number": ({"window": 5}, TypeError, ["window", "pair", "5"]),
    "three": ({"window": (1, 2, 3)}, TypeError, ["window", "pair"]),
    "a float": ({"window": (1.0, 0)}, TypeError, ["window", "integers", "1.0", "left"]),
    "a bool": ({"window": (1, True)}, TypeError, ["window", "integers", "right"]),
    "negative": ({"window": (-1, 0)}, ValueError, ["window", "-1", "left"]),
    "spans a list": ({"spans": [[0, 1]]}, TypeError, ["spans", "list"]),
    "spans int64": ({"spans": torch.zeros(1, 1, 5, 2, dtype=torch.int64)}, TypeError, ["spans", "int32", "int64"]),
    "spans of keys": ({"spans": torch.zeros(1, 1, 7, 2, dtype=torch.int32)}, ValueError, ["spans", "(1, 1, 7, 2)", "5"]),
    "spans of 3 heads": ({"spans": torch.zeros(1, 3, 5, 2, dtype=torch.int32)}, ValueError, ["spans", "(1, 3, 5, 2)"]),
    "spans of 3 dimensions": ({"spans": torch.zeros(1, 5, 2, dtype=torch.int32)}, ValueError, ["spans", "(1, 5, 2)"]),
    "spans elsewhere": ({"spans": torch.zeros(1, 1, 5, 2, dtype=torch.int32, device="meta")}, ValueError, ["spans", "meta"]),
}


@pytest.mark.parametrize("options, error, words", BAD.values(), ids=BAD)
def check_bad_windows_and_spans(options, error, words):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 7, 16)
    expect_error(lambda: flash_attention(q, k, k, **options), error, words)


# ---- every backend


def small(target, **options) -> Case:
    return served_interval(target, Case(B=2, H=4, Hkv=2, D=64, **options))


def served_interval(target, case: Case) -> Case:
    if not getattr(BACKENDS[target.backend], "intervals", True):
        pytest.skip(f"{target.backend} serves no windows or spans")
    return served(target, case)


@pytest.mark.parametrize("Nq, Nk", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def check_windows(target, window, Nq, Nk):
    for causal in (False, True):
        # One column per row: dS is 0 except for rounding, and naive attention, computed differently, rounds less.
        slack = 4 if window[0] == 0 and (causal or window[1] == 0) else 1
        against_truth(small(target, Nq=Nq, Nk=Nk, window=window, causal=causal), target, slack)


@pytest.mark.parametrize("Nq, Nk", LENGTHS[1:])
@pytest.mark.parametrize("kind", SPANS)
def check_spans(target, kind, Nq, Nk):
    for seed, causal in enumerate((False, True)):
        against_truth(small(target, Nq=Nq, Nk=Nk, spans=kind, causal=causal, seed=seed), target)


@pytest.mark.parametrize("Nq, Nk", [(9, 5), (70, 150), (257, 300)])
def check_memory_used_again(target, Nq, Nk):
    """A call finds in its workspace what the call before left there, counts of what blocks have done among it."""
    for seed in range(10 if target.device == "cuda" else 1):
        for options in ({"window": (20, 40)}, {"spans": "any", "causal": True}):
            against_truth(small(target, Nq=Nq, Nk=Nk, seed=seed, **options), target)


@pytest.mark.parametrize("options", [{"window": (30, 9), "spans": "documents"}, {"spans": "any"}, {"window": (70, 0)}], ids=str)
def check_with_everything(target, options):
    """Beside a mask and dropout, with every kind of head size."""
    case = dict(Nq=150, Nk=203, mask="full", dropout_p=0.25, **options)
    for D, Dv in ((64, 64), (40, 72), (128, 128), (256, 256)):
        against_truth(served_interval(target, Case(B=2, H=2, D=D, Dv=Dv, **case)), target)


def check_equals_the_dense_mask(target):
    """A window and documents give the same as the equivalent mask, nearly to the bit: only the order of sums differs."""
    case = small(target, Nq=300, Nk=300)
    q, k, v, _ = case.inputs(target.device)
    for options in ({"window": (50, 20)}, {"spans": documents([0, 100, 1, 3, 196]).to(target.device)}):
        left, right = options.get("window", (None, None))
        mask = Visible(300, 300, left, right, options.get("spans")).dense(slice(0, 300), slice(0, 300), target.device)
        got = flash_attention(q, k, v, **options, return_lse=True, backend=target.backend)
        want = flash_attention(q, k, v, mask, return_lse=True, backend=target.backend)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, atol=2e-6 if case.dtype == torch.float32 else 2e-3, rtol=0)


def check_right_0_is_causal(target):
    q, k, v, _ = small(target, Nq=130, Nk=150).inputs(target.device)
    same = [flash_attention(q, k, v, backend=target.backend, **options) for options in ({"causal": True}, {"window": (None, 0)})]
    assert torch.equal(*same)
    both = [flash_attention(q, k, v, backend=target.backend, **o) for o in ({"causal": True, "window": (9, 4)}, {"window": (9, 0)})]
    assert torch.equal(*both)


def check_parts_of_a_whole(target):
    """Parts of a larger call, at their positions in it, see and drop the same elements as there: two halves of the keys, merged by LSE,
    give the whole result."""
    case = small(target, Nq=192, Nk=256, dropout_p=0.3, spans="documents")
    q, k, v, _ = case.inputs(target.device)
    seed, spans = torch.tensor(77, device=target.device), case.make_spans(target.device).expand(2, 4, 192, 2)
    settings = Settings(0.125, 0.3, 90, 20, target.backend)
    whole, LSE = ops.forward(q, k, v, None, spans, seed, *settings)
    dropout = Dropout(0.3, seed, range(2), range(4))
    want = normal_attention(q, k, v, visible=Visible(192, 256, 90, 20, spans), scale=0.125, dropout=dropout)
    torch.testing.assert_close(whole, want, atol=4e-3 if case.dtype != torch.float32 else 2e-6, rtol=0)
    for rows in (slice(0, 64), slice(64, 192)):
        O, L = [], []
        for columns in (slice(0, 128), slice(128, 256)):
            place = settings._replace(q_offset=rows.start, k_offset=columns.start, diagonal=64)
            part = q[:, :, rows], k[:, :, columns], v[:, :, columns], None, spans[:, :, rows], seed
            o, l = ops.forward(*part, *place)
            O.append(o.float()), L.append(l.float())
        total = torch.logaddexp(*L)
        weights = [(l - total).exp().nan_to_num(0)[..., None] for l in L]
        merged = sum(o * w for o, w in zip(O, weights, strict=True))
        torch.testing.assert_close(merged, whole[:, :, rows].float(), atol=4e-3 if case.dtype != torch.float32 else 2e-6, rtol=0)
        torch.testing.assert_close(total, LSE[:, :, rows].float(), atol=1e-4, rtol=0)


def check_repeats(target, repeatable):
    """Deterministic gradients repeat bit for bit, and nothing is read that has not been written."""
    for options in ({"window": (100, 30)}, {"spans": "any"}, {"spans": "documents"}):
        problem = Problem.of(small(target, Nq=300, Nk=400, **options), target)
        results = [problem.answer(target) for _ in range(3)]
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- transforms


def check_op(target):
    """torch.library's own checks of the ops, with spans, a window and offsets."""
    case = small(target, Nq=9, Nk=14)
    q, k, v, _ = case.inputs(target.device)
    spans = torch.tensor([[2, 11]], dtype=torch.int32, device=target.device).expand(2, 4, 9, 2)
    for options in (Settings(0.25, 0.0, 3, 4, target.backend), Settings(0.25, 0.0, 3, None, target.backend, None, 64, 128, 70)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(ops.forward.default, (*leaves, None, spans, None, *options))
        O, LSE = ops.forward(q, k, v, None, spans, None, *options)
        dO = torch.randn_like(O)
        torch.library.opcheck(ops.backward.default, (dO, None, q, k, v, None, spans, O, LSE, None, *options))


@pytest.mark.parametrize("compiler", compilers())
def check_compile(target, compiler):
    case = small(target, Nq=100, Nk=100)
    q, k, v, _ = (None if x is None else x.requires_grad_() for x in case.inputs(target.device))
    spans = documents([60, 40]).to(target.device)

    def f(q, k, v, spans):
        return flash_attention(q, k, v, window=(20, 5), spans=spans, backend=target.backend).float().square().sum()

    torch.compiler.reset()
    compiled = torch.compile(f, backend=compiler, fullgraph=True)
    for g, h in zip(
        torch.autograd.grad(compiled(q, k, v, spans), (q, k, v)), torch.autograd.grad(f(q, k, v, spans), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(g, h)


def check_export():
    class Layer(torch.nn.Module):
        def forward(self, q, spans):
            return flash_attention(q, q, q, window=(7, 2), spans=spans)

    q, spans = torch.randn(1, 2, 30, 16), documents([10, 20])
    program = torch.export.export(Layer(), (q, spans))
    assert torch.equal(program.module()(q, spans), Layer()(q, spans))


def check_vmap_and_jacrev(target):
    """Mapped spans are folded into the batch; unmapped ones are kept."""
    case = small(target, Nq=20, Nk=20)
    q, k, v, _ = case.inputs(target.device)
    several = torch.stack([documents([5, 15]), documents([20]), documents([1, 19])]).to(target.device)
    attend = lambda q, s: flash_attention(q, k, v, spans=s, window=(9, 9), backend=target.backend)  # noqa: E731
    got = vmap(attend)(torch.stack([q, q + 1, q - 1]), several)
    for n, x in enumerate((q, q + 1, q - 1)):
        torch.testing.assert_close(got[n], attend(x, several[n]), atol=1e-6 if case.dtype == torch.float32 else 2e-3, rtol=0)
    torch.testing.assert_close(vmap(attend, (0, None))(q[None], several[0])[0], attend(q, several[0]))
    J = jacrev(lambda x: attend(x, several[0])[0, 0, :2, :3].float())(q)
    x = q.clone().requires_grad_()
    (row,) = torch.autograd.grad(attend(x, several[0])[0, 0, 1, 2].float(), x)
    torch.testing.assert_close(J[1, 2], row, atol=1e-6 if case.dtype == torch.float32 else 2e-3, rtol=0)


@pytest.mark.parametrize(
    "options", [{"window": (2, 1)}, {"spans": documents([2, 0, 3])}, {"window": (1, None), "causal": True}], ids=("window", "spans", "both")
)
def check_derivatives(options):
    """First and second derivatives on the reference, in float64, against finite differences."""
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        O, LSE = flash_attention(q, k, v, **options, return_lse=True)
        return O, LSE.masked_fill(LSE.isneginf(), 0)

    assert torch.autograd.gradcheck(f, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v))


def check_layer():
    """The layer hands its window on; one out of range is refused at construction; layers pickled before it had one load."""
    import pickle

    x = torch.randn(2, 40, 32)
    torch.manual_seed(0)
    layer = FlashAttention(32, heads=2, dim_head=16, causal=True, window=(5, None))
    left = Visible(40, 40, 5, 0).dense(slice(0, 40), slice(0, 40))[0, 0]
    windowed = layer(x)
    layer.window, layer.causal = None, False
    torch.testing.assert_close(windowed, layer(x, mask=left[None, None].expand(2, 1, 40, 40)))
    state = layer.__dict__.copy()
    del state["window"]
    older = pickle.loads(pickle.dumps(layer))
    older.__setstate__(state)
    assert older.window is None
    expect_error(lambda: FlashAttention(32, window=(-1, 0)), ValueError, ["window", "-1"])


# ---- skipping


def check_hidden_tiles_are_not_computed():
    """Counted by `observe`, forward and backward: a window and documents visit only tiles in which some row sees something."""
    from flash_attention.reference import flash2

    Q, K, V = torch.randn(3, 1, 1, 2048, 16).unbind()
    for visible in (Visible(2048, 2048, 128, 0), Visible(2048, 2048, spans=documents([500, 1, 0, 47, 1500]))):
        visited = []

        def note(i, j, visited=visited, **_):
            visited.append((i, j))

        O, LSE = flash2.flash_attention2_forward(Q, K, V, visible=visible, block_q=64, block_k=64, observe=note)
        flash2.flash_attention2_backward(Q, K, V, None, O, LSE, V, visible=visible, block_q=64, block_k=64, observe=note)
        dense = visible.dense(slice(0, 2048), slice(0, 2048))[0, 0]
        needed = dense.view(32, 64, 32, 64).any(3).any(1).sum()
        assert all(dense[i, j].any() for i, j in visited[: len(visited) // 2])
        assert len(visited) < 2 * 1.7 * needed + 64, f"{len(visited)} tiles were visited, {int(needed)} hold something"


def check_a_window_is_fast_and_takes_linear_memory():
    """Tiles are computed for little more than what a window sees, and nothing of size Nq · Nk is allocated."""
    N, left = 4096, 256
    q, k, v = torch.randn(3, 1, 2, N, 64).unbind()
    visible, visited = Visible(N, N, left, 0), []
    block_q, block_k = reference_backend._block_sizes(visible, Settings(1.0, left=left, right=0))
    watch = {"observe": lambda i, j, **_: visited.append((i, j)), "block_q": block_q, "block_k": block_k}
    flash2.flash_attention2_forward(q, k, v, visible=visible, **watch)
    scores = sum((i.stop - i.start) * (j.stop - j.start) for i, j in visited)
    assert N * left < scores < 2 * N * left, scores
    with torch.profiler.profile(profile_memory=True) as profile:
        flash_attention(q, k, v, window=(512, 0), spans=documents([1000, 3096]))
    largest = max(event.self_cpu_memory_usage for event in profile.events())  # afterwards the op only frees memory
    assert largest < 4096 * 4096, f"{largest} bytes were allocated at once"


def check_a_plain_call_takes_a_kernel_for_intervals(monkeypatch):
    from flash_attention.backends import choose, cuda, libraries
    from flash_attention.call import Call, Form

    monkeypatch.setattr(cuda.Rung, "why_not", lambda *call: None)
    monkeypatch.setattr(libraries, "sm_count", lambda device: 132)
    x = Form(torch.Size((2, 3, 2000, 64)), (384000, 128000, 64, 1), torch.float16, torch.device("cuda:0"))
    for window in (Settings(1.0, left=5), Settings(1.0, q_offset=64), Settings(1.0)):
        call = Call(x, x, x, None, None, window)
        assert choose(None, call) == choose("hopper", call) == choose("cuda", call) == "hopper"


if __name__ == "__main__":
    run_alone(__file__)
