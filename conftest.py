"""How every test and doctest runs: in float64, and strict about silent broadcasting.

This file lies at the top so that `pytest tolerax/driver.py` (doctests) sees it too.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

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

    XLA ends the process at a flag it does not know, and flags go with its versions: each is tried
    in a process of its own, once for all workers, which inherit what is set here.
    """
    given = os.environ.get("XLA_FLAGS", "")
    asked = [f"--{name}={value}" for name, value in PLAIN_CODE.items() if name not in given]
    started = [(flag, _process_with(f"{given} {flag}")) for flag in asked]
    known = [flag for flag, process in started if process.wait() == 0]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *known])


def _process_with(flags: str) -> subprocess.Popen[bytes]:
    """A process that starts XLA with these flags."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


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
