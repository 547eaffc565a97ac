"""P2, total-variation denoising with two parameters, beside dynamic DFO-LS."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import tolerax
from benchmarks.dfols import Evaluated, dynamic_dfols
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.reference import both_levels
from benchmarks.runs import Loss, first_below, record
from tolerax.problems.library import Denoising, tv_denoising

# Tuned on seeds 100 and 101: looser answers or a longer first radius end higher, tighter ones cost
# several times as much.
ACCURACY, RADIUS = 0.03, 0.5
COST = 5_000


def smoothness(x: Array) -> Float[Array, ""]:
    """1 + 8 w / nu: the data term and the total variation of forward differences."""
    return 1 + 8 * jnp.exp(x[0] - x[1])


def run_dfols(
    ready: Denoising, accuracy: float, radius: float, evaluations: int
) -> list[Evaluated]:
    """Dynamic DFO-LS with one residual a picture, whose squares sum to the upper level."""
    clean, (_, lower) = ready.clean, both_levels(ready.problem)

    def residuals(y: Array) -> Float[Array, " pictures"]:
        return jnp.sqrt(jnp.sum((y - clean) ** 2, axis=(1, 2)) / (2 * clean.shape[0]))

    return dynamic_dfols(
        residuals,
        lower,
        ready.noisy,
        np.asarray(ready.x0),
        smoothness=smoothness,
        strong_convexity=lambda x: jnp.ones((), x.dtype),
        max_evaluations=evaluations,
        accuracy=accuracy,
        radius=radius,
    )


def running_best(trace: list[Evaluated], ready: Denoising) -> list[Evaluated]:
    """At each evaluation the one with the lowest value seen by the method so far."""
    best, out = None, []
    for now in trace:
        value = float(ready.problem.oracle.cost(now.y, jnp.asarray(now.x)))
        if best is None or value < best[0]:
            best = (value, now)
        out.append(best[1]._replace(cost=now.cost))
    return out


def compare(seed: int, settings: Settings) -> tuple[float, dict]:
    """Lower iterations to DFO-LS's final loss, ours over DFO-LS's."""
    ready = tv_denoising(seed, *((32, 4) if settings.quick else (96, 10)))
    loss = Loss(ready.problem)
    peer = running_best(run_dfols(ready, ACCURACY, RADIUS, 40 if settings.quick else 100), ready)
    start, final = loss(ready.x0), loss(jnp.asarray(peer[-1].x))
    target = final + 1e-3 * (start - final)
    peer_cost = first_below([e.cost for e in peer], [jnp.asarray(e.x) for e in peer], loss, target)
    answers = record(ready.problem, tolerax.InexactLineSearch(), ready.x0, COST)
    cost = first_below(
        [told.cost for told in answers], [told.best_x for told in answers], loss, target
    )
    ours = loss(answers[-1].best_x)
    ratio = float("inf") if cost is None or peer_cost is None else cost / peer_cost
    settings.tell(
        f"   seed {seed} p2: {cost} / {peer_cost} iterations to {target:.5g} (start {start:.5g}, "
        f"ours ends at {ours:.5g})"
    )
    return ratio, {"ours": cost, "peer": peer_cost, "target": target, "final": ours}


def measure(settings: Settings) -> dict[str, Measured]:
    """All seeds."""
    rows = [compare(seed, settings) for seed in settings.seeds]
    return {
        "p2_cost_vs_dfols": Measured(
            [ratio for ratio, _ in rows], detail={"rows": [row for _, row in rows]}
        )
    }


GROUP = Group(
    "p2",
    (Bar("p2_cost_vs_dfols", "<=", 0.2, "P2: lower iterations to dynamic DFO-LS's final loss"),),
    measure,
)
