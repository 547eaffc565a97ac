"""How every test and doctest runs: in float64, and strict about silent broadcasting.

This file lies at the top so that `pytest tolerax/driver.py` (doctests) sees it too.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from tests.plain_code import ask_for_plain_code
from tests.signatures import check_signatures

PACKAGE = Path(__file__).parent / "tolerax"
# The links at the top level show the same files again.
collect_ignore = ["solvers", "problems"]

# Examples and the guide run as users' code does, apart from the gallery at small size.
ask_for_plain_code()
jax.config.update("jax_enable_x64", True)
# (n,) + (n, 1) is (n, n) in NumPy's rules: in a solver that is nearly always a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first run of an example compiles, so a deadline per example means nothing; fixed
# examples make a failure on one machine a failure on all.
hypothesis.settings.register_profile("tolerax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tolerax")

check_signatures("tolerax")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Import the package whole before pytest imports its modules one by one for their doctests,
    which would otherwise make a second copy of those that the package itself imports.

    Not before: the process that hands out the tests to workers needs no package, nor does one that
    runs pages of the guide.
    """
    if collector.path.is_relative_to(PACKAGE):
        import tolerax  # noqa: F401


def pytest_collection_finish() -> None:
    """Python need not look for garbage among all that is imported, and not after every 700 objects:
    tracing makes millions."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled() -> Iterator[None]:
    """Compiled programs go when their module is done: each holds memory maps, of which a process
    may have 65,530 on Linux, and XLA dies of the last one. And no test finds what others compiled,
    so that counts of compilations do not depend on their order."""
    yield
    jax.clear_caches()
