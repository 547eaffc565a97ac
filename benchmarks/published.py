"""Against HOAG and MAID on P1 (640 penalties) and P3 (Field of Experts).

All run on the same oracle and are charged in lower gradients plus Hessian products. The published
methods keep their published ground: Euclidean error bounds with honest constants and a first-order
lower solver (L-BFGS, which costs them less than the accelerated gradient method of the MAID
experiments). Loss means the true upper loss: the lower level solved tightly, uncharged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.runs import Loss, Told, first_below, record
from tolerax.inner import LBFGS
from tolerax.problems.library import Denoising, LibraryProblem

SCHEDULES: Mapping[str, Callable[[], tolerax.HOAG]] = {
    "0.9^k": lambda: tolerax.HOAG(schedule="geometric", decay=0.9),
    "1/k^2": lambda: tolerax.HOAG(schedule="power", power=2.0),
    "1/k^3": lambda: tolerax.HOAG(schedule="power", power=3.0),
}
MAID_STEPS = (1.0, 100.0)
# Units that every method may spend (P1: in a full run, in a quick one).
P1_COST, P3_COST = (20_000, 5_000), 5_000


class Reached(NamedTuple):
    """The best loss of a run, the total cost when it was first reached, and where."""

    loss: float
    cost: int
    x: PyTree


def best_of(answers: Sequence[Told], loss: Loss, checkpoints: int = 25) -> Reached:
    """The lowest true loss among points of a run: its best point at the end, and points at evenly
    spaced costs (the loss of a method without a descent test may rise on the way)."""
    costs = np.array([told.cost for told in answers])
    rows = {int(np.searchsorted(costs, c)) for c in np.linspace(0, costs[-1], checkpoints)}
    found = [Reached(loss(answers[row].x), answers[row].cost, answers[row].x) for row in rows]
    end = answers[-1]
    found.append(Reached(loss(end.best_x), end.cost, end.best_x))
    return min(found, key=lambda one: (one.loss, one.cost))


def cost_to(answers: Sequence[Told], loss: Loss, target: float) -> float:
    """Our cost until the best point so far has a true loss of at most `target`. Certified values
    find the answer to within their error; the true loss then decides."""
    cost = first_below(
        [told.cost for told in answers], [told.best_x for told in answers], loss, target
    )
    return float("inf") if cost is None else float(cost)


def published(make: Callable[..., LibraryProblem], seed: int) -> LibraryProblem:
    """A problem as HOAG and MAID were published to see it."""
    return make(seed, norm="euclidean", lower_solver=LBFGS())


def versus(
    make: Callable[..., LibraryProblem],
    peers: Mapping[str, Callable[[], tolerax.Solver]],
    seed: int,
    cost: int,
    settings: Settings,
) -> dict[str, Any]:
    """Our run and the peers' best losses, with our costs to reach each of them."""
    ours, theirs = make(seed), published(make, seed)
    loss = Loss(ours.problem)
    start = loss(ours.x0)
    reached = {}
    for name, peer in peers.items():
        reached[name] = best_of(record(theirs.problem, peer(), theirs.x0, cost), loss)
        settings.tell(f"   seed {seed} {name}: {reached[name].loss:.5g} at {reached[name].cost}")
    answers = record(ours.problem, tolerax.InexactLineSearch(), ours.x0, cost)
    costs = {}
    for name, (value, _, _) in reached.items():
        # Reached up to a thousandth of what the peer has gained, the same for both.
        costs[name] = cost_to(answers, loss, value + 1e-3 * (start - value))
        settings.tell(f"   seed {seed} ours to {name}: {costs[name]:g}")
    return {"start": start, "peers": reached, "costs": costs, "loss": loss, "answers": answers}


def hoag() -> dict[str, Callable[[], tolerax.Solver]]:
    """HOAG on its three schedules."""
    return {f"HOAG {name}": make for name, make in SCHEDULES.items()}


def maid() -> dict[str, Callable[[], tolerax.Solver]]:
    """MAID from two first steps; the better one counts."""
    return {f"MAID {a:g}": lambda a=a: tolerax.MAID(first_step=a) for a in MAID_STEPS}


def ratio_to_best(result: Mapping[str, Any], family: str) -> float:
    """Our cost to the family's best final loss, over that member's cost."""
    members = {k: v for k, v in result["peers"].items() if k.startswith(family)}
    best = min(members, key=lambda name: members[name].loss)
    return result["costs"][best] / members[best].cost


def measure_p1(settings: Settings) -> dict[str, Measured]:
    """P1 against both."""
    from tolerax.problems.library import digits_penalties

    rows = [
        versus(digits_penalties, hoag() | maid(), seed, P1_COST[settings.quick], settings)
        for seed in settings.seeds
    ]
    detail = [
        {
            "peers": {name: (peer.loss, peer.cost) for name, peer in row["peers"].items()},
            "costs": row["costs"],
        }
        for row in rows
    ]
    return {
        "p1_cost_vs_hoag": Measured(
            [ratio_to_best(row, "HOAG") for row in rows], detail={"rows": detail}
        ),
        "p1_cost_vs_maid": Measured([ratio_to_best(row, "MAID") for row in rows]),
    }


def measure_p3(settings: Settings) -> dict[str, Measured]:
    """P3 against HOAG: cost, and decibels at equal cost (smaller pictures in a quick run)."""
    from tolerax.problems.library import field_of_experts

    def make(seed: int, **options: Any) -> Denoising:
        return field_of_experts(seed, *((32, 3) if settings.quick else (64, 10)), **options)

    ratios, gains, details = [], [], []
    for seed in settings.seeds:
        result = versus(make, hoag(), seed, P3_COST, settings)
        loss, best = result["loss"], min(result["peers"].values(), key=lambda one: one.loss)
        theirs = float(make(seed).psnr(loss.solution(best.x)))
        ours = float(make(seed).psnr(loss.solution(result["answers"][-1].best_x)))
        settings.tell(f"   seed {seed} p3: {ours:.2f} dB, best HOAG {theirs:.2f} dB")
        ratios.append(ratio_to_best(result, "HOAG"))
        gains.append(ours - theirs)
        details.append({"costs": result["costs"], "psnr": ours, "peer_psnr": theirs})
    return {
        "p3_cost_vs_hoag": Measured(ratios, detail={"rows": details}),
        "p3_psnr_gain_db": Measured(gains),
    }


P1_GROUP = Group(
    "p1",
    (
        Bar("p1_cost_vs_hoag", "<=", 0.05, "P1: cost to best HOAG's final loss / HOAG's cost"),
        Bar("p1_cost_vs_maid", "<=", 0.1, "P1: the same against MAID"),
    ),
    measure_p1,
)

P3_GROUP = Group(
    "p3",
    (
        Bar("p3_cost_vs_hoag", "<=", 0.1, "P3: cost to best HOAG's final loss / HOAG's cost"),
        Bar("p3_psnr_gain_db", ">=", 0.5, "P3: decibels above the best HOAG, same cost"),
    ),
    measure_p3,
)
