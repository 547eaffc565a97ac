"""What holds for every solver on every convex quadratic with bounds, tried on random ones."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.registry import FAMILIES

N = 3
EPS = np.finfo(float).eps
every_family = pytest.mark.parametrize("entry", FAMILIES, ids=str)


class Quadratic(eqx.Module):
    """Half the sum of `d (x - c)^2`: its minimum within bounds is the projection of c."""

    d: jax.Array
    c: jax.Array

    def __call__(self, x):
        return 0.5 * jnp.sum(self.d * (x - self.c) ** 2)


def vectors(low, high):
    return st.lists(st.floats(low, high), min_size=N, max_size=N).map(np.array)


@st.composite
def cases(draw):
    """Curvatures, centre, start and bounds around the start; some are tight, some are far."""
    d, c, start = draw(vectors(0.1, 10)), draw(vectors(-3, 3)), draw(vectors(-3, 3))
    below, above = draw(vectors(0, 3)), draw(vectors(0, 3))
    wide = draw(st.booleans())
    return d, c, start, start - below - 9 * wide, start + above + 9 * wide


def solve(entry, d, c, start, lower, upper):
    problem = tolerax.Objective(
        Quadratic(jnp.asarray(d), jnp.asarray(c)),
        bounds=(jnp.asarray(lower), jnp.asarray(upper)),
    )
    return zoo.run(problem, entry.solver(), jnp.asarray(start))


@every_family
@hypothesis.settings(max_examples=25)
@hypothesis.given(case=cases())
def test_success_means_that_the_criterion_holds(entry, case):
    d, c, start, lower, upper = case
    solution = solve(entry, *case)
    x = np.asarray(solution.x)
    assert np.all((x >= lower) & (x <= upper))
    scale = zoo.stationarity(d * (start - c), start, lower, upper)
    measure = zoo.stationarity(d * (x - c), x, lower, upper)
    if solution.success:
        # Twice the tolerance, as at the second look of a solver, and the rounding of the gradient.
        assert measure <= 2 * (1e-6 + 1e-8 * scale) + 100 * EPS
        np.testing.assert_allclose(x, np.clip(c, lower, upper), atol=(measure + EPS) / d.min())
    low, high = solution.interval
    truth = 0.5 * np.sum(d * (x - c) ** 2)
    assert low - 100 * EPS * truth <= truth <= high + 100 * EPS * truth


@every_family
@hypothesis.settings(max_examples=25)
@hypothesis.given(case=cases())
def test_the_best_value_only_falls_and_is_returned(entry, case):
    solution = solve(entry, *case)
    rows = solution.history.rows()
    best, slack = rows["best_value"], 1 + 8 * EPS
    assert np.all(best[1:] <= best[:-1] * slack)
    assert float(solution.value) <= rows["value"].min() * slack
    assert np.all(np.diff(rows["points"]) >= 0)
    assert len(best) == int(solution.steps)


@every_family
@hypothesis.settings(max_examples=15)
@hypothesis.given(case=cases(), order=st.permutations(range(N)))
def test_the_order_of_the_variables_does_not_matter(entry, case, order):
    one, other = solve(entry, *case), solve(entry, *(part[list(order)] for part in case))
    # Sums are taken in another order: equal up to rounding, which grows along the run.
    rows, permuted = one.history.rows()["value"][:4], other.history.rows()["value"][:4]
    np.testing.assert_allclose(rows, permuted, rtol=1e-6, atol=1e-12)
    if one.success and other.success:
        np.testing.assert_allclose(
            np.asarray(one.x)[list(order)], other.x, atol=4e-6 / case[0].min()
        )
