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

# Units that every method may spend (P1: in a full run, in a quick one).
P1_COST, P3_COST = (20_000, 5_000), 5_000


class Peer(NamedTuple):
    """A solver, and whether it sees the problem as HOAG and MAID were published to see it."""

    solver: tolerax.Solver
    published: bool = True


HOAG = {
    "HOAG 0.9^k": Peer(tolerax.HOAG(schedule="geometric", decay=0.9)),
    "HOAG 1/k^2": Peer(tolerax.HOAG(schedule="power", power=2.0)),
    "HOAG 1/k^3": Peer(tolerax.HOAG(schedule="power", power=3.0)),
}
MAID = {f"MAID {step:g}": Peer(tolerax.MAID(first_step=step)) for step in (1.0, 100.0)}


class Rival(NamedTuple):
    """What a peer reached: its best loss and where, its cost to within a thousandth of what it
    gained, and our cost to the same loss."""

    loss: float
    x: PyTree
    cost: float
    ours: float


class Comparison(NamedTuple):
    """One seed: every peer by name, our last point, and the loss."""

    rivals: dict[str, Rival]
    x: PyTree
    loss: Loss

    def ratio(self, family: str) -> float:
        """Our cost over its own of the family's member with the lowest loss."""
        members = [one for name, one in self.rivals.items() if name.startswith(family)]
        best = min(members, key=lambda one: one.loss)
        return best.ours / best.cost

    def detail(self) -> dict[str, Any]:
        """What lies behind the ratios."""
        return {k: (v.loss, v.cost, v.ours) for k, v in self.rivals.items()}


def points_of(answers: Sequence[Told], checkpoints: int = 25) -> list[tuple[int, PyTree]]:
    """Points of a run with their costs, at evenly spaced costs (the loss of a method without a
    descent test may rise on the way), and its best point at the end."""
    costs = np.array([told.cost for told in answers])
    rows = {int(np.searchsorted(costs, c)) for c in np.linspace(0, costs[-1], checkpoints)}
    found = [(answers[row].cost, answers[row].x) for row in sorted(rows)]
    return [*found, (answers[-1].cost, answers[-1].best_x)]


def versus(
    make: Callable[..., LibraryProblem],
    peers: Mapping[str, Peer],
    seed: int,
    cost: int,
    settings: Settings,
) -> Comparison:
    """Our run beside those of the peers."""
    ours = make(seed)
    theirs = make(seed, norm="euclidean", lower_solver=LBFGS())
    loss = Loss(ours.problem)
    start = loss(ours.x0)
    answers = record(ours.problem, tolerax.InexactLineSearch(), ours.x0, cost)
    rivals = {}
    for name, peer in peers.items():
        problem = theirs.problem if peer.published else ours.problem
        points = points_of(record(problem, peer.solver, ours.x0, cost))
        lowest, x = min(((loss(x), x) for _, x in points), key=lambda one: one[0])
        target = lowest + 1e-3 * (start - lowest)
        their_cost = next(spent for spent, x in points if loss(x) <= target)
        our_cost = first_below(
            [told.cost for told in answers], [told.best_x for told in answers], loss, target
        )
        reached = float("inf") if our_cost is None else our_cost
        rivals[name] = Rival(lowest, x, their_cost, reached)
        settings.tell(f"   seed {seed} {name}: {lowest:.5g} at {their_cost}, ours at {reached:g}")
    return Comparison(rivals, answers[-1].best_x, loss)


def measure_p1(settings: Settings) -> dict[str, Measured]:
    """P1 against both."""
    from tolerax.problems.library import digits_penalties

    rows = [
        versus(digits_penalties, HOAG | MAID, seed, P1_COST[settings.quick], settings)
        for seed in settings.seeds
    ]
    detail = {"rows": [row.detail() for row in rows]}
    return {
        "p1_cost_vs_hoag": Measured([row.ratio("HOAG") for row in rows], detail=detail),
        "p1_cost_vs_maid": Measured([row.ratio("MAID") for row in rows]),
    }


def measure_p3(settings: Settings) -> dict[str, Measured]:
    """P3 against HOAG: cost, and decibels at equal cost (smaller pictures in a quick run)."""
    from tolerax.problems.library import field_of_experts

    def make(seed: int, **options: Any) -> Denoising:
        return field_of_experts(seed, *((32, 3) if settings.quick else (64, 10)), **options)

    ratios, gains, details = [], [], []
    for seed in settings.seeds:
        row, ready = versus(make, HOAG, seed, P3_COST, settings), make(seed)
        best = min(row.rivals.values(), key=lambda one: one.loss)
        ours, theirs = (float(ready.psnr(row.loss.solution(x))) for x in (row.x, best.x))
        settings.tell(f"   seed {seed} p3: {ours:.2f} dB, best HOAG {theirs:.2f} dB")
        ratios.append(row.ratio("HOAG"))
        gains.append(ours - theirs)
        details.append(row.detail() | {"psnr": ours, "peer_psnr": theirs})
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
