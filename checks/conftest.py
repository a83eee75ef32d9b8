"""pytest's part of the harness: the `target` fixture and three flags.

--full runs whole grids instead of a subset. --backend NAME runs only that backend's checks. --keep notes which kernels were inspected for
spills (results/inspected.json): until their sources change, they are not compiled again for that.
"""

import os
import zlib

# Many checks are tiny: threads that spin between operations would cost more than the operations, especially beside other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from harness import TARGETS

from flash_attention.backends import GROUPS


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the whole grids, not their fast subsets")
    parser.addoption("--keep", action="store_true", help="check_build: write results/inspected.json")
    parser.addoption("--backend", help="check only this backend")


def pytest_configure(config):
    names = [*dict.fromkeys(target.backend for target in TARGETS), *GROUPS]
    wanted = config.getoption("--backend")
    if wanted not in (None, *names):  # otherwise nothing would be checked, and everything would pass
        raise pytest.UsageError(f"--backend must be one of {', '.join(names)}, got {wanted!r}")


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--backend")
        targets = [t for t in TARGETS if wanted is None or t.backend in GROUPS.get(wanted, (wanted,))]
        cases = [pytest.param(t, id=str(t)) for t in targets if not t.why_not()]
        # One skipped case stands for all of them: there would be thousands, which take CI a minute.
        missing = [t for t in targets if t.why_not()][:1]
        cases += [pytest.param(t, marks=pytest.mark.skip(reason=t.why_not()), id=t.device) for t in missing]
        metafunc.parametrize("target", cases)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("only_full"):
                item.add_marker(pytest.mark.skip(reason="run by --full"))


@pytest.fixture(autouse=True)
def seeded(request):
    """A check gets the same random numbers alone and after other checks."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def leaves_no_mode():
    """A check that leaves a mode active, or disables torch's modes, would make a later check fail."""
    yield
    assert not torch._C._len_torch_function_stack(), "it leaves a TorchFunctionMode active"
    assert not torch._C._is_torch_function_all_disabled(), "it leaves all TorchFunctionModes without effect"


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture
def keep(request) -> bool:
    return request.config.getoption("--keep")


@pytest.fixture
def repeatable():
    """Deterministic mode: gradients repeat bit for bit, and torch fills uninitialised tensors with NaN, which shows what a kernel fails to
    write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
