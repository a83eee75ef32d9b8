"""A large call on a CPU is computed in pieces, by threads: the same result for any number of them, and no side effects for the caller.

python checks/check_workers.py
"""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch
from harness import CPU, Case, Problem, run_alone

from flash_attention import flash_attention
from flash_attention.backends import reference, workers
from flash_attention.call import Settings

pytestmark = pytest.mark.skipif(not workers.AVAILABLE, reason="this PyTorch has one number of threads for the whole process")

CASES = (
    Case(B=1, H=1, Nq=200, Nk=150, D=8),
    Case(B=2, H=4, Hkv=2, Nq=150, Nk=200, D=8, causal=True, mask="dead rows"),
    Case(B=1, H=2, Nq=200, Nk=90, D=8, causal=True, dropout_p=0.3),  # rows that attend nothing
    Case(B=1, H=2, Nq=130, Nk=131, D=8, Dv=5, mask="full", dropout_p=0.3),
    Case(B=3, H=2, Nq=70, Nk=140, D=8, dtype=torch.bfloat16, causal=True),
    Case(B=2, H=2, Nq=200, Nk=150, D=8, window=(30, 9), spans="documents", dropout_p=0.2, dtype=torch.bfloat16),
    Case(B=2, H=2, Nq=150, Nk=200, D=8, window=(30, None), spans="any", causal=True),
    Case(B=1, H=2, Nq=0, Nk=9, D=8),
    Case(B=1, H=2, Nq=9, Nk=0, D=8, causal=True),
)


@pytest.fixture(autouse=True)
def threads():
    """Two threads while a check runs; the check may change the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_pieces(monkeypatch):
    """Makes every call go to workers, in pieces of 40 rows or columns."""
    for name, value in {"WORKER_FLOPS": 0, "WORKER_STEP": 0, "WORKER_SET": 1, "SPAN": 40}.items():
        monkeypatch.setattr(reference, name, value)


def results(case: Case):
    """O, LSE, dQ, dK, dV, without autograd."""
    q, k, v, mask = case.inputs("cpu")
    problem = Problem.of(case, CPU, dLSE=True)
    mask = None if mask is None else mask if mask.dim() == 4 else mask[:, None, None]
    mask = None if mask is None else mask.expand(case.B, case.H, case.Nq, case.Nk)
    seed = torch.tensor(7) if case.dropout_p else None
    left, right = case.window or (None, None)
    settings, spans = Settings(0.3, case.dropout_p, left, 0 if case.causal else right), case.make_spans("cpu")
    O, LSE = reference.forward(settings, q, k, v, mask, spans, seed)
    return O, LSE, *reference.backward(settings, False, problem.dO, problem.dLSE, q, k, v, mask, spans, O, LSE, seed)[:3]


@pytest.mark.parametrize("case", CASES, ids=str)
def check_same_for_any_number_of_threads(case, small_pieces, monkeypatch):
    """Results repeat bit for bit; and they equal those of one piece, except for the rounding of dQ, which is summed piece by piece."""
    first = results(case)
    for number in (1, 2, 3, 3):
        torch.set_num_threads(number)
        for name, x, y in zip(("O", "LSE", "dQ", "dK", "dV"), first, results(case), strict=True):
            assert torch.equal(x, y), f"{name} differs with {number} threads"
    monkeypatch.setattr(reference, "WORKER_FLOPS", 1 << 62)
    for name, x, y in zip(("O", "LSE", "dQ", "dK", "dV"), first, results(case), strict=True):
        if x.dtype == torch.float32:
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:  # rounded once, after the sum
            assert (x != y).float().mean() < 0.01, f"{name}: {(x != y).float().mean():.1%} of its elements differ"


def computing_threads(size: int) -> set[int]:
    """Threads that compute a call of this length."""
    seen = set()
    run = reference.flash2.flash_attention2_forward

    def watched(*args, **options):
        seen.add(threading.get_ident())
        return run(*args, **options)

    reference.flash2.flash_attention2_forward = watched
    try:
        flash_attention(*torch.randn(3, 1, 1, size, 8).unbind())
    finally:
        reference.flash2.flash_attention2_forward = run
    return seen


def check_who_computes(small_pieces, monkeypatch):
    """A large call is computed by as many workers as torch.set_num_threads last set; a small call, and any call with one thread, by the
    caller, and then no thread is started."""
    here = threading.get_ident()
    alive = threading.active_count()
    torch.set_num_threads(1)
    assert computing_threads(400) == {here}
    assert threading.active_count() == alive, "a thread was started for one thread"
    for number in (2, 3):
        torch.set_num_threads(number)
        seen = set().union(*(computing_threads(400) for _ in range(20)))
        assert here not in seen and len(seen) <= number, f"{len(seen)} threads computed, of {number}"
    monkeypatch.setattr(reference, "WORKER_FLOPS", 1 << 33)
    assert computing_threads(400) == {here}
    monkeypatch.setattr(reference, "WORKER_FLOPS", 0)
    monkeypatch.setattr(reference, "WORKER_STEP", 1 << 17)
    assert computing_threads(400) == {here}, "steps so small that workers would wait for Python's lock"


def in_new_thread(work):
    """Runs work() in a new thread and returns its result."""
    returned = []
    thread = threading.Thread(target=lambda: returned.append(work()))
    thread.start()
    thread.join()
    return returned[0]


def check_number_of_threads_stays():
    """A worker has its share of the threads; the caller's number, and the number with which later threads start, are unchanged."""
    torch.set_num_threads(3)
    in_new_thread(lambda: torch.set_num_threads(5))  # what later threads begin with
    numbers = []
    for number in (3, 2, workers.MAX_WORKERS * 2 + 1):
        torch.set_num_threads(number)
        in_new_thread(lambda: torch.set_num_threads(5))
        workers.run(lambda _: numbers.append(torch.get_num_threads()), [(n,) for n in range(40)])
        assert set(numbers) == {2 if number > workers.MAX_WORKERS else 1}
        numbers.clear()
        assert torch.get_num_threads() == number
        assert in_new_thread(torch.get_num_threads) == 5
    for _ in range(20):  # several at once
        in_new_thread(lambda: workers.run(lambda _: time.sleep(0.001), [(n,) for n in range(10)]))
    assert in_new_thread(torch.get_num_threads) == 5


def check_old_workers_end():
    """Each calling thread has its own; they end with it, and when their number changes."""
    for _ in range(5):
        in_new_thread(lambda: workers.run(lambda _: None, [(n,) for n in range(9)]))
    for number in (4, 3, 2):
        torch.set_num_threads(number)
        workers.run(lambda _: None, [(n,) for n in range(9)])
    deadline = time.monotonic() + 10
    while len(alive := [x.name for x in threading.enumerate() if x.name.startswith("flash_attention")]) > 2:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.01)


def check_exceptions_arrive():
    """The caller gets the exception itself; pieces that have not started are dropped, and the next call works."""
    done = []

    def work(n):
        if n == 3:
            raise ValueError("piece 3")
        time.sleep(0.005)
        done.append(n)

    for _ in range(6):  # whichever worker it is
        done.clear()
        with pytest.raises(ValueError, match="piece 3"):
            workers.run(work, [(n,) for n in range(1000)])
        finished = len(done)
        assert finished < 900
        time.sleep(0.02)
        assert len(done) == finished, "a worker was still at work when the exception arrived"
    done.clear()
    workers.run(done.append, [(n,) for n in range(20)])
    assert sorted(done) == list(range(20))


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def check_interrupt():
    """Ctrl-C reaches a waiting caller, and pieces that have not started are dropped."""
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore Ctrl-C

    def work(n):
        if n == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.005)
        done.append(n)

    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run(work, [(n,) for n in range(1000)])
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(0.1)  # what has started ends
    finished = len(done)
    time.sleep(0.1)
    assert len(done) == finished < 900


def check_modes(small_pieces):
    """Inference mode, no_grad, autocast, a default dtype and a subclass: as with one thread."""

    class Watched(torch.Tensor):
        calls: ClassVar = set()

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.add(function)
            return super().__torch_function__(function, types, args, kwargs)

    q, k, v = torch.randn(3, 1, 2, 120, 8).unbind()
    expected = flash_attention(q, k, v)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", enabled=False)):
        with mode:
            assert torch.equal(flash_attention(q, k, v), expected)
    with torch.inference_mode():
        inputs = [x.clone() for x in (q, k, v)]
        assert inputs[0].is_inference() and torch.equal(flash_attention(*inputs), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(flash_attention(q, k, v), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    seen = []
    for number in (1, 2):
        torch.set_num_threads(number)
        Watched.calls.clear()
        watched = flash_attention(*(x.as_subclass(Watched) for x in (q, k, v)))
        seen.append(set(Watched.calls))
        assert torch.equal(watched.as_subclass(torch.Tensor), expected)
    assert seen[0] == seen[1], f"calls seen with one thread and with two differ in {seen[0] ^ seen[1]}"
    trained = q.clone().requires_grad_()
    assert torch.equal(
        torch.ops.flash_attention.forward(trained, k, v, None, None, None, *Settings(8**-0.5, backend="reference"))[0], expected
    )


def check_several_callers(small_pieces):
    """Threads of the user's own that call at the same time; none waits for another's call."""
    other_is_done = threading.Event()
    waiting = threading.Thread(target=workers.run, args=(lambda _: other_is_done.wait(20), [(1,), (2,)]))
    waiting.start()
    workers.run(lambda _: None, [(1,), (2,)])
    assert waiting.is_alive()
    other_is_done.set()
    waiting.join()

    inputs = [torch.randn(3, 1, 2, 120, 8).unbind() for _ in range(6)]
    expected = [flash_attention(*x) for x in inputs]
    returned = {}

    def caller(n):
        returned[n] = [flash_attention(*inputs[n]) for _ in range(5)]

    callers = [threading.Thread(target=caller, args=(n,)) for n in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for n, each in enumerate(expected):
        assert all(torch.equal(x, each) for x in returned[n])


def check_no_more_threads(small_pieces, monkeypatch):
    """If the system cannot start more threads, the caller computes."""
    q, k, v = torch.randn(3, 1, 2, 120, 8).unbind()
    expected = flash_attention(q, k, v)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers.ThreadPoolExecutor, "submit", refuse)
    assert torch.equal(flash_attention(q, k, v), expected)


PROGRAM = """
import os, sys, threading, time, torch
from flash_attention import flash_attention
from flash_attention.backends import reference
reference.WORKER_FLOPS = reference.WORKER_STEP = 0
reference.SPAN = 40
torch.set_num_threads(2)
q, k, v = torch.randn(3, 1, 2, 200, 8).unbind()
expected = flash_attention(q, k, v)
"""


def run_program(text: str) -> str:
    child = subprocess.run([sys.executable, "-c", PROGRAM + text], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def check_fork():
    """A child that was forked after its parent had workers starts its own."""
    assert "same" in run_program("""
if os.fork() == 0:
    same = all(torch.equal(flash_attention(q, k, v), expected) for _ in range(5))
    print("same" if same else "different", flush=True)
    os._exit(0)
os.wait()
""")


def check_after_the_main_thread():
    """A thread that outlives the main thread can still make calls, although Python starts no more threads by then."""
    assert "same" in run_program("""
def later():
    threading.main_thread().join()
    time.sleep(0.1)
    print("same" if torch.equal(flash_attention(q, k, v), expected) else "different", flush=True)
threading.Thread(target=later).start()
""")


if __name__ == "__main__":
    run_alone(__file__)
