"""Shifted and rotated functions, where no coordinate can be found by itself."""

from benchmarks.cbo_functions import Draw, Rotated, griewank, rastrigin
from benchmarks.cbo_peers import beside
from benchmarks.cbo_runs import Case, success
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax import CBO
from tolerax.solvers import Covariance, RankWeights

BUDGET = 100_000


def covariance_setting() -> CBO:
    """The one setting for all of these functions."""
    return CBO(particles=750, consensus=RankWeights(), noise=Covariance())


def measure(settings: Settings) -> dict[str, Measured]:
    """Our runs and, in a full benchmark, the peers beside them."""
    solver = covariance_setting()
    steps = BUDGET // solver.particles

    def one(name: str, draw: Draw, d: int) -> Measured:
        found = success(Case(name, draw, d, solver, steps, each_quick=10), settings)
        peers = beside(draw, d, BUDGET, settings)
        return Measured(found.samples, value=found.figure, detail={**found.detail, "peers": peers})

    return {
        "rotated_d10": one("rotated_d10", Rotated(rastrigin), 10),
        "griewank_d10": one("griewank_d10", Rotated(griewank), 10),
        "rotated_d20": one("rotated_d20", Rotated(rastrigin), 20),
    }


GROUP = Group(
    "rotated",
    (
        Bar("rotated_d10", ">=", 0.95, "success, rotated Rastrigin at 100,000 evaluations"),
        Bar("griewank_d10", ">=", 0.98, "success, rotated Griewank at 100,000 evaluations"),
        Bar("rotated_d20", ">=", 0.7, "success, rotated Rastrigin at 100,000 evaluations"),
    ),
    measure,
)
