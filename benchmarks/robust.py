"""Does it matter where the tolerances and the step start? The denoiser P2 (pictures of 32 x 32)
from twelve settings."""

import itertools

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.runs import Loss, first_below, record
from tolerax.problems.library import tv_denoising

TOLERANCES = (1.0, 1e-1, 1e-3, 1e-5)
STEPS = (1e-2, 1.0, 1e2)
COST = 5_000


def spreads(seed: int, settings: Settings) -> tuple[float, float, dict]:
    """Largest over smallest cost to the common target (the lowest final loss, up to a thousandth of
    what it gained), and the relative spread of final losses."""
    ready = tv_denoising(seed, 32, 4 if settings.quick else 10)
    loss = Loss(ready.problem)
    runs = {}
    for tolerance, step in itertools.product(TOLERANCES, STEPS):
        solver = tolerax.InexactLineSearch(
            accuracy=tolerax.Accuracy(tolerance, tolerance), first_step=step
        )
        answers = record(ready.problem, solver, ready.x0, COST)
        runs[f"{tolerance:g}, {step:g}"] = answers
    finals = {name: loss(answers[-1].best_x) for name, answers in runs.items()}
    lowest = min(finals.values())
    target = lowest + 1e-3 * (loss(ready.x0) - lowest)
    costs = {
        name: first_below(
            [told.cost for told in answers], [told.best_x for told in answers], loss, target
        )
        for name, answers in runs.items()
    }
    reached = [cost for cost in costs.values() if cost is not None]
    cost_spread = max(reached) / min(reached) if len(reached) == len(costs) else float("inf")
    loss_spread = max(finals.values()) / lowest - 1
    settings.tell(f"   seed {seed}: costs {costs}, final losses within {loss_spread:.2e}")
    return cost_spread, loss_spread, {"costs": costs, "finals": finals}


def measure(settings: Settings) -> dict[str, Measured]:
    """All seeds."""
    rows = [spreads(seed, settings) for seed in settings.seeds]
    return {
        "robust_cost_spread": Measured(
            [cost for cost, _, _ in rows], detail={"rows": [detail for _, _, detail in rows]}
        ),
        "robust_loss_spread": Measured([spread for _, spread, _ in rows]),
    }


GROUP = Group(
    "robust",
    (
        Bar("robust_cost_spread", "<=", 3.0, "P2 at 32 x 32: dearest / cheapest of 12 starts"),
        Bar("robust_loss_spread", "<=", 0.01, "relative spread of their final losses"),
    ),
    measure,
)
