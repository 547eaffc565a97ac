"""Figures about time: what importing costs, what the oracle adds to the gradients it takes."""

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.monitoring

import tolerax
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

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            found.append(f"{duration_secs:.3f} s")

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


def measure_oracle(settings: Settings) -> dict[str, Measured]:
    """Wall time of a warm oracle call on P2 per unit of work, over that of the jitted gradient of
    the lower level, in turn; compilations when x, tolerances or warm starts change."""
    from tolerax.problems.library import tv_denoising

    ready = tv_denoising(settings.seeds[0], 64 if settings.quick else 96)
    oracle = ready.problem.oracle
    gradient = eqx.filter_jit(lambda lower, y, x: jax.grad(lower)(y, x))
    evaluate = eqx.filter_jit(lambda problem, query: problem.evaluate(query))
    x, y = ready.x0 + 1.0, ready.noisy
    query = tolerax.Query(x, tolerax.Accuracy(1e-4, 1e-4))
    units = int(evaluate(ready.problem, query).work.units)
    ratios = []
    for _ in range(3 if settings.quick else 15):
        raw = seconds_per_call(lambda: gradient(oracle.potential, y, x), 10)
        ours = seconds_per_call(lambda: evaluate(ready.problem, query), 1)
        ratios.append(ours / units / raw)
    return {
        "oracle_overhead": Measured(ratios, detail={"units_per_call": units}),
        "recompilations": Measured([recompilations()]),
    }


def recompilations() -> int:
    """Compilations in calls that differ from a first one in numbers only."""
    from tolerax.problems.library import quadratic

    ready = quadratic(0, n=50, d=5)
    evaluate = eqx.filter_jit(lambda problem, query: problem.evaluate(query))

    def use(shift: float, tolerance: float, carry: Any) -> Any:
        x = ready.x0 + shift
        told = evaluate(
            ready.problem, tolerax.Query(x, tolerax.Accuracy(tolerance, 2 * tolerance), carry)
        )
        solver = tolerax.InexactLineSearch(
            rtol=tolerance, accuracy=tolerax.Accuracy(tolerance, tolerance)
        )
        tolerax.solve(ready.problem, solver, x, max_steps=50)
        return told.carry

    carry = use(0.0, 1e-2, ready.problem.cold_start())
    with compilations() as found:
        for k in range(1, 6):
            carry = use(0.1 * k, 10.0 ** (-2 - k), carry)
    return len(found)


ORACLE_GROUP = Group(
    "oracle",
    (
        Bar("oracle_overhead", "<=", 1.3, "oracle seconds per unit of work / raw jitted gradient"),
        Bar("recompilations", "<=", 0, "compilations when tolerances, x or warm starts change"),
    ),
    measure_oracle,
)

IMPORT_GROUP = Group(
    "import",
    (Bar("import_seconds", "<=", 1.0, "seconds to import tolerax over `import jax` alone"),),
    measure_import,
)
