"""Points on workers: whether their number or a lost one changes a run."""

import os
import time
from pathlib import Path

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


def trajectory(fun: object, workers: int) -> tuple[np.ndarray, int]:
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
        executor=workers,
    )
    return np.concatenate(points), int(solution.state.failures)


def measure(settings: Settings) -> dict[str, Measured]:
    """CDSM on 1 and on 8 processes, and on 2 of which one dies."""
    import tempfile

    alone, failed = trajectory(simulator, 1)
    many, _ = trajectory(simulator, 2 if settings.quick else 8)
    differ = int(alone.shape != many.shape or not np.array_equal(alone, many))
    with tempfile.TemporaryDirectory() as folder:
        mark = str(Path(folder) / "killed")
        points, lost = trajectory(KillsOnce(mark, always=False), 2)
        killed = Path(mark).exists()
    same = points.shape == alone.shape and np.array_equal(points, alone)
    settings.tell(f"   {failed} points fail; with a worker killed {lost} do (killed: {killed})")
    innocent = abs(lost - failed) if killed and same else len(alone)
    return {
        "trajectories_differ": Measured([float(differ)]),
        "innocent_tasks_lost": Measured([float(innocent)]),
    }


GROUP = Group(
    "workers",
    (
        Bar("trajectories_differ", "<=", 0, "whether 1 and 8 processes give other points"),
        Bar("innocent_tasks_lost", "<=", 0, "points lost with a worker that was killed"),
    ),
    measure,
)
