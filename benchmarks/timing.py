"""Figures about time: what importing costs, what the oracle adds to the gradients it takes."""

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring

from benchmarks.frame import Bar, Group, Measured, Settings

IMPORT = """
import time, jax
start = time.perf_counter()
import tolerax
print(time.perf_counter() - start)
"""
COMPILED = "/jax/core/compile/backend_compile_duration"


def import_seconds(runs: int) -> list[float]:
    """Seconds that `import tolerax` takes after `import jax`, each in a fresh interpreter."""
    command = [sys.executable, "-c", IMPORT]
    subprocess.run(command, check=True, capture_output=True)  # writes the bytecode files
    return [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]


def measure_import(settings: Settings) -> dict[str, Measured]:
    """The median over fresh interpreters."""
    return {"import_seconds": Measured(import_seconds(3 if settings.quick else 9))}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for every XLA compilation inside the `with`."""
    found: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(f"{duration:.3f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def seconds_per_call(call: Callable[[], Any], repeats: int) -> float:
    """The median wall time of a warm call, its result waited for."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


IMPORT_GROUP = Group(
    "import",
    (Bar("import_seconds", "<=", 1.0, "seconds to import tolerax over `import jax` alone"),),
    measure_import,
)
