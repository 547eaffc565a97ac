"""How every test and doctest runs: in float64, and strict about silent broadcasting.

This file lies at the top so that `pytest tolerax/driver.py` (doctests) sees it too.
"""

import mmap
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import jax
import pytest

# The links at the top level show the same files again.
collect_ignore = ["solvers", "problems"]

# Tests compile much and compute little, and four fifths of their time was the compiler's: they ask
# for plain machine code, which takes a third of it. Examples and the guide run as users' code does.
PLAIN_CODE = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}


def ask_for_plain_code() -> None:
    """Set XLA_FLAGS before the first compilation reads them, and for the processes of tests.

    XLA ends the process at a flag it does not know, and flags go with its versions: only those
    whose names are in its library are set.
    """
    given = os.environ.get("XLA_FLAGS", "")
    package = find_spec("jaxlib")
    folder = Path(package.origin or ".").parent if package else Path()
    library = max(folder.glob("*.so"), key=lambda path: path.stat().st_size, default=None)
    if library is None:
        return
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        known = [
            f"--{name}={value}"
            for name, value in PLAIN_CODE.items()
            if name not in given and code.find(name.encode()) >= 0
        ]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *known])


ask_for_plain_code()
jax.config.update("jax_enable_x64", True)
# (n,) + (n, 1) is (n, n) in NumPy's rules: in a solver that is nearly always a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first run of an example compiles, so a deadline per example means nothing; fixed
# examples make a failure on one machine a failure on all.
hypothesis.settings.register_profile("tolerax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tolerax")

# Import the package whole before pytest imports its modules one by one for their doctests,
# which would otherwise make a second copy of those that the package itself imports.
import tolerax  # noqa: E402, F401


@pytest.fixture(autouse=True, scope="module")
def forget_compiled() -> Iterator[None]:
    """Compiled programs go when their module is done: each holds memory maps, of which a process
    may have 65,530 on Linux, and XLA dies of the last one."""
    yield
    jax.clear_caches()
