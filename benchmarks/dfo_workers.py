"""Points on workers: whether their number or a lost one changes a run."""

import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings


def simulator(x: np.ndarray) -> float:
    """Takes longer at some points than at others, and has no value in a corner."""
    time.sleep(0.002 * float(np.abs(np.sin(1e3 * x[0]))))
    if x[0] + x[1] > 0.8:
        raise ArithmeticError("no convergence")
    return float(np.sum(np.ceil(4 * np.abs(x - 0.3)) + (x - 0.3) ** 2))


class KillsOnce:
    """The same, but one of the points kills its worker: every time, or only the first."""

    def __init__(self, mark: str, always: bool):
        self.mark, self.always = mark, always

    def __call__(self, x: np.ndarray) -> float:
        if 0.9 < x[0] < 1.1 and (self.always or not Path(self.mark).exists()):
            Path(self.mark).touch()
            os._exit(1)
        return simulator(x)


def standard_pool() -> ProcessPoolExecutor:
    """Two processes of the standard library."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def dask() -> Iterator[Any]:
    """Two processes of a local Dask cluster, where a task may lose one worker."""
    import dask.config
    import distributed

    settings = {
        "distributed.scheduler.allowed-failures": 1,
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with warnings.catch_warnings(), dask.config.set(settings):
        warnings.simplefilter("ignore")
        cluster = distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,  # pyright: ignore[reportArgumentType]
            silence_logs=logging.CRITICAL,
        )
        with cluster, distributed.Client(cluster) as client:
            yield client.get_executor(pure=False)


def trajectory(fun: object, executor: Any) -> tuple[np.ndarray, int]:
    """Every point in order, and how many failed."""
    problem = tolerax.Objective(
        fun,  # pyright: ignore[reportArgumentType]
        bounds=(jnp.full(3, -2.0), jnp.full(3, 2.0)),
        host=True,
        on_error="fail",
    )
    points = []
    solution = tolerax.solve(
        problem,
        tolerax.CDSM(),
        jnp.array([-1.0, 0.5, 1.0]),
        max_work={"points": 120},
        callback=lambda step: points.append(np.asarray(step.query.x)[np.asarray(step.query.mask)]),
        executor=executor,
    )
    return np.concatenate(points), int(solution.state.failures)


def measure(settings: Settings) -> dict[str, Measured]:
    """CDSM on 1 and on 8 processes; and on 2 of which one dies, which are ours, those of a pool of
    the standard library and of Dask."""
    alone, failed = trajectory(simulator, 1)
    many, _ = trajectory(simulator, 2 if settings.quick else 8)
    differ = int(alone.shape != many.shape or not np.array_equal(alone, many))
    innocent = []
    with dask() as cluster:
        for name, executor in (("own", 2), ("pool", standard_pool), ("Dask", cluster)):
            with tempfile.TemporaryDirectory() as folder:
                mark = Path(folder) / "killed"
                points, lost = trajectory(KillsOnce(str(mark), always=False), executor)
                killed = mark.exists()
            same = points.shape == alone.shape and np.array_equal(points, alone)
            innocent.append(float(abs(lost - failed) if killed and same else len(alone)))
            settings.tell(
                f"   {name}: {failed} points fail, {lost} with a worker killed ({killed}), "
                f"trajectory the same: {same}"
            )
    return {
        "trajectories_differ": Measured([float(differ)]),
        "innocent_tasks_lost": Measured(innocent, max(innocent)),
    }


GROUP = Group(
    "workers",
    (
        Bar("trajectories_differ", "<=", 0, "whether 1 and 8 processes give other points"),
        Bar("innocent_tasks_lost", "<=", 0, "points lost with a worker that was killed"),
    ),
    measure,
)
