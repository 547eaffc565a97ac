"""Do the certificates hold, and how loose are they? Every answer of runs on P0 and P1, and answers
at random points far from any run, against dense reference solves."""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.reference import Dense
from benchmarks.runs import Told, record

P0_COST, P1_COST = 500, 2_000


class Check(NamedTuple):
    """One answer against the truth. Slack is what the reference itself may be wrong by."""

    violated: bool
    looseness: float
    value_excess: float
    gradient_excess: float


def check(answers: Iterable[Told], problem: tolerax.Bilevel, slack: float = 1e-12) -> list[Check]:
    """Every answer against a reference solve to a relative accuracy of `slack`."""
    truth = Dense.of(problem)
    _, unravel = ravel_pytree(problem.oracle.y0)
    checks, first = [], None
    for told in answers:
        true = truth(told.x, unravel(told.y))
        error = float(jnp.linalg.norm(_flat(told.gradient) - _flat(true.gradient)))
        size = float(jnp.linalg.norm(_flat(true.gradient)))
        first = size if first is None else first
        value_excess = abs(told.value - true.value) - told.value_error - slack * abs(true.value)
        gradient_excess = error - told.gradient_error - slack * max(size, first)
        checks.append(
            Check(
                value_excess > 0 or gradient_excess > 0,
                told.gradient_error / max(error, slack * max(size, first)),
                value_excess,
                gradient_excess,
            )
        )
    return checks


def _flat(tree: PyTree) -> jax.Array:
    return ravel_pytree(tree)[0]


def probes(problem: tolerax.Bilevel, x0: PyTree, seed: int) -> list[Told]:
    """Answers at random points at random tolerances, each from a cold start: levels of x0 shifted
    down by up to 4 with spreads of up to 3 about it, so that mu ranges over many decades."""
    rng = np.random.default_rng([seed, 17])
    evaluate = jax.jit(lambda x, a: problem.evaluate(tolerax.Query(x, a)))
    answers = []
    for spread in (0.0, 1.0, 2.0, 3.0):
        for shift in (0.0, -2.0, -4.0):
            x = x0 + shift + spread * jnp.asarray(rng.standard_normal(x0.shape))
            state, adjoint = 10.0 ** rng.uniform(-5, -1, size=2)
            told = evaluate(x, tolerax.Accuracy(state, adjoint))
            answers.append(
                Told(
                    0,
                    x,
                    float(told.value),
                    float(told.value_error),
                    told.gradient,
                    float(told.gradient_error),
                    told.carry.y,
                    x,
                )
            )
    return answers


def measure(settings: Settings) -> dict[str, Measured]:
    """Violations over all answers; looseness over the recorded iterates only."""
    from tolerax.problems.library import digits_penalties, quadratic

    violations, looseness, checked = [], {"p0": [], "p1": []}, {"p0": 0, "p1": 0}
    for seed in settings.seeds:
        broken = 0
        for name, ready, cost in (
            ("p0", quadratic(seed), P0_COST),
            ("p1", digits_penalties(seed), P1_COST),
        ):
            answers = record(ready.problem, tolerax.InexactLineSearch(), ready.x0, cost)
            run = check(answers, ready.problem)
            extra = check(probes(ready.problem, ready.x0, seed), ready.problem)
            broken += sum(one.violated for one in run + extra)
            looseness[name].append(statistics.median(one.looseness for one in run))
            checked[name] += len(run) + len(extra)
            settings.tell(
                f"   seed {seed} {name}: {len(run)} iterates, {len(extra)} probes, "
                f"{sum(one.violated for one in run + extra)} violations, bound / error "
                f"{looseness[name][-1]:.3g} on iterates, "
                f"{statistics.median(one.looseness for one in extra):.3g} on probes"
            )
        violations.append(broken)
    return {
        "certificate_violations": Measured(
            violations, value=sum(violations), detail={"answers": checked}
        ),
        "bound_looseness_p0": Measured(looseness["p0"]),
        "bound_looseness_p1": Measured(looseness["p1"]),
    }


GROUP = Group(
    "certificates",
    (
        Bar("certificate_violations", "<=", 0, "answers on P0, P1 whose bounds miss the truth"),
        Bar("bound_looseness_p0", "<=", 20, "median gradient bound / true error on P0"),
        Bar("bound_looseness_p1", "<=", 100, "the same on P1"),
    ),
    measure,
)
