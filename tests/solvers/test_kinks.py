"""Runs that end at a kink are no successes; those that end at a flat minimum are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import CDSM, ModelTrustRegion, Status
from tolerax.solvers._kinks import Bend

CASES = {
    # The way down is narrow: at the origin only directions near (1, 1) descend.
    "valley": lambda x: 10 * jnp.abs(x[0] - x[1]) + jnp.abs(x[0] + x[1] - 2),
    "bent valley": lambda x: jnp.abs(1 - x[0]) + 10 * jnp.abs(x[1] - x[0] ** 2),
    "two sheets": lambda x: jnp.maximum(x[0] ** 2 + 4 * x[1], 3 * x[0] - x[1]) + x[1] ** 4,
    "fourth power": lambda x: jnp.sum((x - 0.4) ** 4),
    "far from 0": lambda x: 1e5 + 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2,
    "badly scaled": lambda x: (x[0] - 0.3) ** 2 + 1e4 * (x[1] - 0.3) ** 2,
    "not symmetric": lambda x: jnp.exp(3 * x[0]) - 3 * x[0] + jnp.cosh(x[1]) ** 2,
}
KINKED = ("valley", "bent valley", "two sheets")
every = pytest.mark.parametrize("solver", [ModelTrustRegion(), CDSM()], ids=["models", "cdsm"])


class Chosen(eqx.Module):
    """One of the cases by its number, so that all share a compilation."""

    kind: jax.Array

    def __call__(self, x):
        return jax.lax.switch(self.kind, list(CASES.values()), x)


@every
@pytest.mark.parametrize("name", CASES)
def test_what_a_run_ends_with(solver, name):
    problem = tolerax.Objective(Chosen(jnp.asarray(list(CASES).index(name))))
    for seed in range(3):
        solution = tolerax.solve(
            problem, solver, jnp.array([-1.2, 1.0]), key=jax.random.key(seed), max_steps=4000
        )
        expected = Status.stalled if name in KINKED else Status.converged_estimated
        assert solution.status == expected


def bend(f, length, *, points=None, error=0.0):
    center = jnp.array([0.2, 0.1])
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (2, 2)))
    steps = length * jnp.concatenate([q, -q])
    points = center[None] + steps if points is None else points(center[None] + steps)
    values = jax.vmap(f)(points)
    middle = jnp.atleast_1d(f(center))
    about = (jnp.asarray(length), jnp.ones(1), jnp.asarray(error))
    return Bend.of(center, middle, points, values.reshape(4, 1), *about)


@pytest.mark.parametrize(
    ("f", "kinked"),
    [
        (lambda x: jnp.sum(x**2), False),
        (lambda x: jnp.sum((x - jnp.array([0.2, 0.1])) ** 4), False),
        (lambda x: jnp.sum(x), False),
        # All of the second differences are rounding.
        (lambda x: 1e9 + jnp.sum(x**2), False),
        (lambda x: 0.1 * x[0] + 0.7 * x[1] - 0.09, False),
        (lambda x: jnp.abs(x[0] + 2 * x[1] - 0.4), True),
        (lambda x: jnp.maximum(x[0] - 0.2, 0) + jnp.sum(x**2), True),
    ],
)
def test_powers_of_second_differences(f, kinked):
    far, near = bend(f, 1e-3), bend(f, 1e-4)
    assert bool(near.kinked(far)) == kinked


def test_sums_are_the_trace_whatever_the_basis():
    H = jnp.array([[3.0, 1.0], [1.0, 7.0]])
    found = bend(lambda x: 0.5 * (H @ x) @ x, 1e-2)
    np.testing.assert_allclose(found.sums, 1e-4 * 10.0, rtol=1e-9)


def test_what_is_not_known_tells_no_kink():
    def kink(x):
        return jnp.abs(x[0] + 2 * x[1] - 0.4)

    far = bend(kink, 1e-3)
    # Errors of values may be all of it; points that a bound moved say nothing.
    assert not bool(bend(kink, 1e-4, error=1e-3).kinked(far))
    clipped = bend(kink, 1e-4, points=lambda p: jnp.minimum(p, jnp.array([[0.2, 0.1]])))
    assert not bool(jnp.isfinite(clipped.length))
    assert not bool(clipped.kinked(far))
    failing = bend(lambda x: jnp.where(x[0] > 0.2, jnp.nan, kink(x)), 1e-4)
    assert not bool(failing.kinked(far))
