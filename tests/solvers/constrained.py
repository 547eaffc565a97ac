"""Constrained problems with known solutions, after Hock and Schittkowski (*Test Examples for
Nonlinear Programming Codes*, Springer 1981; numbers as there), and hard ones of our own.

All are embedded in the same number of variables and constraints, and which one it is is an array:
every run of a solver shares one compilation. Rows that a problem does not have are `0 = 0`: they
depend on all others, which a solver has to bear.
"""

import dataclasses
import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax

N, M = 7, 4
INF = np.inf
ROOT = np.sqrt(3.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """f, c, start, `(lower, upper)` of the constraints and of x, the minimum and where it is."""

    fun: Callable
    cons: Callable
    start: tuple
    of_c: tuple
    value: float
    x: tuple | None = None
    of_x: tuple = (-INF, INF)


def equal(count):
    return ([0.0] * count, [0.0] * count)


def positive(count):
    return ([0.0] * count, [INF] * count)


CASES = {
    "6": Case(
        lambda x: (1 - x[0]) ** 2,
        lambda x: [10 * (x[1] - x[0] ** 2)],
        (-1.2, 1.0),
        equal(1),
        0.0,
        (1.0, 1.0),
    ),
    # The first point lies where the gradients of both spheres agree but for 1 part in 50,000.
    "two spheres": Case(
        lambda x: -x[0] - x[1] - x[2],
        lambda x: [
            x[0] ** 2 + x[1] ** 2 + x[2] ** 2 - 9,
            (x[0] - 1) ** 2 + x[1] ** 2 + x[2] ** 2 - 9,
        ],
        (5.0, 1e-4, -1e-4),
        equal(2),
        -0.5 - np.sqrt(17.5),
        (0.5, np.sqrt(4.375), np.sqrt(4.375)),
    ),
    "7": Case(
        lambda x: jnp.log(1 + x[0] ** 2) - x[1],
        lambda x: [(1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4],
        (2.0, 2.0),
        equal(1),
        -ROOT,
        (0.0, ROOT),
    ),
    # The constraint has no slope at the start.
    "316": Case(
        lambda x: (x[0] - 20) ** 2 + (x[1] + 20) ** 2,
        lambda x: [(x[0] ** 2 + x[1] ** 2) / 100 - 1],
        (0.0, 0.0),
        equal(1),
        2 * (20 - 50**0.5) ** 2,
        (50**0.5, -(50**0.5)),
    ),
    "28": Case(
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        lambda x: [x[0] + 2 * x[1] + 3 * x[2] - 1],
        (-4.0, 1.0, 1.0),
        equal(1),
        0.0,
        (0.5, -0.5, 0.5),
    ),
    "40": Case(
        lambda x: -x[0] * x[1] * x[2] * x[3],
        lambda x: [x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]],
        (0.8, 0.8, 0.8, 0.8),
        equal(3),
        -0.25,
    ),
    "42": Case(
        lambda x: sum((x[i] - i - 1) ** 2 for i in range(4)),
        lambda x: [x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2],
        (1.0, 1.0, 1.0, 1.0),
        equal(2),
        28 - 10 * np.sqrt(2),
        (2.0, 2.0, 0.6 * np.sqrt(2), 0.8 * np.sqrt(2)),
    ),
    "48": Case(
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        lambda x: [x[0] + x[1] + x[2] + x[3] + x[4] - 5, x[2] - 2 * (x[3] + x[4]) + 3],
        (3.0, 5.0, -3.0, 2.0, -2.0),
        equal(2),
        0.0,
        (1.0, 1.0, 1.0, 1.0, 1.0),
    ),
    "10": Case(
        lambda x: x[0] - x[1],
        lambda x: [-3 * x[0] ** 2 + 2 * x[0] * x[1] - x[1] ** 2 + 1],
        (-10.0, 10.0),
        positive(1),
        -1.0,
        (0.0, 1.0),
    ),
    "12": Case(
        lambda x: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - 7 * x[0] - 7 * x[1],
        lambda x: [25 - 4 * x[0] ** 2 - x[1] ** 2],
        (0.0, 0.0),
        positive(1),
        -30.0,
        (2.0, 3.0),
    ),
    "15": Case(
        lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2,
        lambda x: [x[0] * x[1] - 1, x[0] + x[1] ** 2],
        (-2.0, 1.0),
        positive(2),
        306.5,
        (0.5, 2.0),
        ([-INF, -INF], [0.5, INF]),
    ),
    "24": Case(
        lambda x: ((x[0] - 3) ** 2 - 9) * x[1] ** 3 / (27 * ROOT),
        lambda x: [x[0] / ROOT - x[1], x[0] + ROOT * x[1], 6 - x[0] - ROOT * x[1]],
        (1.0, 0.5),
        positive(3),
        -1.0,
        (3.0, ROOT),
        ([0.0, 0.0], [INF, INF]),
    ),
    "35": Case(
        lambda x: (
            9
            - 8 * x[0]
            - 6 * x[1]
            - 4 * x[2]
            + 2 * x[0] ** 2
            + 2 * x[1] ** 2
            + x[2] ** 2
            + 2 * x[0] * x[1]
            + 2 * x[0] * x[2]
        ),
        lambda x: [3 - x[0] - x[1] - 2 * x[2]],
        (0.5, 0.5, 0.5),
        positive(1),
        1 / 9,
        (4 / 3, 7 / 9, 4 / 9),
        ([0.0] * 3, [INF] * 3),
    ),
    "43": Case(
        lambda x: (
            x[0] ** 2
            + x[1] ** 2
            + 2 * x[2] ** 2
            + x[3] ** 2
            - 5 * x[0]
            - 5 * x[1]
            - 21 * x[2]
            + 7 * x[3]
        ),
        lambda x: [
            8 - jnp.sum(x[:4] ** 2) - x[0] + x[1] - x[2] + x[3],
            10 - x[0] ** 2 - 2 * x[1] ** 2 - x[2] ** 2 - 2 * x[3] ** 2 + x[0] + x[3],
            5 - 2 * x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - 2 * x[0] + x[1] + x[3],
        ],
        (0.0, 0.0, 0.0, 0.0),
        positive(3),
        -44.0,
        (0.0, 1.0, 2.0, -1.0),
    ),
    "71": Case(
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        lambda x: [x[0] * x[1] * x[2] * x[3] - 25, jnp.sum(x[:4] ** 2) - 40],
        (1.0, 5.0, 5.0, 1.0),
        ([0.0, 0.0], [INF, 0.0]),
        17.0140173,
        (1.0, 4.7429994, 3.8211503, 1.3794082),
        ([1.0] * 4, [5.0] * 4),
    ),
    "76": Case(
        lambda x: (
            x[0] ** 2
            + 0.5 * x[1] ** 2
            + x[2] ** 2
            + 0.5 * x[3] ** 2
            - x[0] * x[2]
            + x[2] * x[3]
            - x[0]
            - 3 * x[1]
            + x[2]
            - x[3]
        ),
        lambda x: [
            5 - x[0] - 2 * x[1] - x[2] - x[3],
            4 - 3 * x[0] - x[1] - 2 * x[2] + x[3],
            x[1] + 4 * x[2] - 1.5,
        ],
        (0.5, 0.5, 0.5, 0.5),
        positive(3),
        -4.681818182,
        (3 / 11, 23 / 11, 0.0, 6 / 11),
        ([0.0] * 4, [INF] * 4),
    ),
    "100": Case(
        lambda x: (
            (x[0] - 10) ** 2
            + 5 * (x[1] - 12) ** 2
            + x[2] ** 4
            + 3 * (x[3] - 11) ** 2
            + 10 * x[4] ** 6
            + 7 * x[5] ** 2
            + x[6] ** 4
            - 4 * x[5] * x[6]
            - 10 * x[5]
            - 8 * x[6]
        ),
        lambda x: [
            127 - 2 * x[0] ** 2 - 3 * x[1] ** 4 - x[2] - 4 * x[3] ** 2 - 5 * x[4],
            282 - 7 * x[0] - 3 * x[1] - 10 * x[2] ** 2 - x[3] + x[4],
            196 - 23 * x[0] - x[1] ** 2 - 6 * x[5] ** 2 + 8 * x[6],
            -4 * x[0] ** 2 - x[1] ** 2 + 3 * x[0] * x[1] - 2 * x[2] ** 2 - 5 * x[5] + 11 * x[6],
        ],
        (1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 1.0),
        positive(4),
        680.6300573,
    ),
    # Our own. One constraint said twice: the Jacobian has no full rank anywhere.
    "twice": Case(
        lambda x: x[0] + x[1],
        lambda x: [x[0] ** 2 + x[1] ** 2 - 2, 2 * x[0] ** 2 + 2 * x[1] ** 2 - 4],
        (-2.0, 0.5),
        equal(2),
        -2.0,
        (-1.0, -1.0),
    ),
    # The linearized constraints contradict each other at the start.
    "contradictory start": Case(
        lambda x: (x[0] - 3) ** 2 + x[1] ** 2,
        lambda x: [x[0] ** 2 - 1, x[0] - 0.5],
        (-0.2, 1.0),
        positive(2),
        0.0,
        (3.0, 0.0),
    ),
    # Curvature is negative along the constraint at the start.
    "saddle": Case(
        lambda x: -2 * x[0] ** 2 + 0.5 * x[0] ** 4 + x[1] ** 2,
        lambda x: [x[1] - x[0]],
        (0.1, 0.1),
        equal(1),
        -0.5,
        (1.0, 1.0),
    ),
    "infeasible": Case(
        lambda x: x[0] + (x[1] - 1) ** 2, lambda x: [x[0] ** 2 + 1], (1.0, 0.0), equal(1), np.nan
    ),
    "two lines": Case(
        lambda x: x[0] ** 2 + x[1] ** 2,
        lambda x: [x[0] + x[1] - 1, x[0] + x[1] - 3],
        (0.0, 0.0),
        equal(2),
        np.nan,
    ),
}


class Chosen(eqx.Module):
    """Objective or constraints of one of `CASES`; variables that it does not have stay at 0."""

    kind: jax.Array
    constraints: bool = eqx.field(static=True)

    def __call__(self, x):
        def value(case):
            rest = jnp.arange(N) >= len(case.start)
            return case.fun(x) + 0.5 * jnp.sum(jnp.where(rest, x, 0) ** 2)

        def rows(case):
            return jnp.zeros(M).at[: len(case.of_c[0])].set(jnp.stack(case.cons(x)))

        part = rows if self.constraints else value
        return jax.lax.switch(self.kind, [lambda c=c: part(c) for c in CASES.values()])


def padded(entries, size, fill):
    out = np.full(size, fill)
    out[: len(entries)] = entries
    return out


def problem(name):
    """The case as a problem, and its start."""
    case = CASES[name]
    kind = jnp.asarray(list(CASES).index(name))
    n = len(case.start)
    sides = [np.broadcast_to(side, (n,)) for side in case.of_x]
    objective = tolerax.Objective(
        Chosen(kind, False),
        bounds=(
            jnp.asarray(padded(sides[0], N, -INF)),
            jnp.asarray(padded(sides[1], N, INF)),
        ),
        constraints=Chosen(kind, True),
        constraint_bounds=tuple(jnp.asarray(padded(side, M, 0.0)) for side in case.of_c),
    )
    return objective, jnp.asarray(padded(case.start, N, 0.0))


@functools.cache
def alone(name):
    """The case without the others, which compiles in a moment, and its start."""
    case = CASES[name]
    objective = tolerax.Objective(
        case.fun,
        bounds=tuple(jnp.broadcast_to(jnp.asarray(side), len(case.start)) for side in case.of_x),
        constraints=lambda x: jnp.stack(case.cons(x)),
        constraint_bounds=tuple(jnp.asarray(side) for side in case.of_c),
    )
    return objective, jnp.asarray(case.start)


@jax.jit
def _derivatives(kind, x):
    constraints = Chosen(kind, True)
    return jax.grad(Chosen(kind, False))(x), constraints(x), jax.jacrev(constraints)(x)


def optimality(objective, x, tolerance=1e-6):
    """Violation, and the distance of the gradient from the cone of the active constraints, by
    bounded least squares: written without the library."""
    from scipy.optimize import lsq_linear

    g, c, a = map(np.asarray, _derivatives(objective.fun.kind, x))
    rows = np.concatenate([c, x]), np.concatenate([a, np.eye(x.size)])
    lower = np.concatenate([objective.limits[0], objective.bounds[0]])
    upper = np.concatenate([objective.limits[1], objective.bounds[1]])
    violation = np.max(np.maximum(np.maximum(lower - rows[0], rows[0] - upper), 0))
    at_lower, at_upper = rows[0] <= lower + tolerance, rows[0] >= upper - tolerance
    any_active = at_lower | at_upper
    sides = (
        np.where(at_lower, -INF, 0.0)[any_active],
        np.where(at_upper, INF, 0.0)[any_active],
    )
    if not np.any(any_active):
        return violation, np.linalg.norm(g)
    fit = lsq_linear(rows[1][any_active].T, -g, bounds=sides)
    return violation, np.linalg.norm(rows[1][any_active].T @ fit.x + g)
