"""What a solver for sums of squares must do: the questions of the other solvers, put in residuals.

A new one joins with one line in `SOLVERS`.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tolerax import BatchedLevenbergMarquardt, LeastSquares, Status

SOLVERS = (BatchedLevenbergMarquardt,)
every = pytest.mark.parametrize("make", SOLVERS)

START, CENTRE = jnp.asarray(zoo.START), jnp.asarray(zoo.CENTRE)
# The functions of the zoo as residuals (|r|^2 / 2 is half of them), and some that fail.
RESIDUALS = {
    "quadratic": lambda x: x - CENTRE,
    "rosenbrock": lambda x: jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]),
    "always_nan": lambda x: x * jnp.nan,
    "nan_region": lambda x: jnp.where(x[0] < 1.5, jnp.nan, x - CENTRE),
}


class Residuals(eqx.Module):
    """One of them, chosen by an array: all runs share one compilation."""

    kind: jax.Array

    def __call__(self, x):
        return jax.lax.switch(self.kind, list(RESIDUALS.values()), x)


def problem(name: str) -> LeastSquares:
    known = zoo.PROBLEMS.get(name) or zoo.Known(name, zoo.START, zoo.CENTRE)
    bounds = (jnp.asarray(known.lower), jnp.asarray(known.upper))
    kind = jnp.asarray(list(RESIDUALS).index(known.fun))
    return LeastSquares(Residuals(kind), bounds=bounds)


@every
@pytest.mark.parametrize("name", list(zoo.PROBLEMS))
def test_reaches_a_known_minimum_within_the_bounds(make, name):
    known, asked = zoo.PROBLEMS[name], []
    solution = zoo.run(
        problem(name), make(), jnp.asarray(known.start), callback=lambda s: asked.append(s.query.x)
    )
    assert solution.status == Status.converged
    # See `criterion` of test_solving; the functions are halved, and so is their curvature.
    np.testing.assert_allclose(solution.x, known.minimum, atol=2e-5)
    assert np.all((np.array(asked) >= known.lower) & (np.array(asked) <= known.upper))
    assert len(asked) == int(solution.work.points) <= 40


@every
def test_statuses(make):
    run = lambda name, **options: zoo.run(problem(name), make(), START, **options)  # noqa: E731
    assert run("rosenbrock", max_work={"points": 2}).status == Status.budget
    assert run("always_nan").status == Status.non_finite_start
    # Not finite half way: the steps are cut short there.
    stopped = run("nan_region")
    assert not stopped.success
    assert 1.5 <= float(stopped.x[0]) < 1.51
    with pytest.raises(TypeError, match="needs residuals"):
        zoo.run(zoo.objective("quadratic"), make(), START)


@every
def test_a_run_goes_on_where_a_budget_stopped_it(make):
    start = jnp.asarray(zoo.PROBLEMS["rosenbrock"].start)
    whole = zoo.run(problem("rosenbrock"), make(), start)
    half = zoo.run(problem("rosenbrock"), make(), start, max_work={"points": 4})
    rest = zoo.run(problem("rosenbrock"), make(), half.state)
    np.testing.assert_array_equal(rest.x, whole.x)
    assert int(rest.steps) == int(whole.steps)


@every
def test_a_batch_of_starts_equals_single_runs(make):
    starts = jnp.array([(4.0, 0.0), (-1.2, 1.0), (jnp.nan, 0.0)])
    one = lambda x: zoo.run(problem("rosenbrock"), make(), x)  # noqa: E731
    batch = jax.jit(jax.vmap(one))(starts)
    for i, start in enumerate(starts):
        single = one(start)
        np.testing.assert_allclose(batch.x[i], single.x, rtol=1e-12)
        assert (batch.status == single.status)[i]


@every
def test_float32_says_what_it_cannot_resolve(make):
    third = LeastSquares(lambda x: jnp.cosh(x - 1 / 3))
    start = jnp.asarray(zoo.START, jnp.float32)
    asking = lambda atol: dataclasses.replace(make(), rtol=0.0, atol=atol)  # noqa: E731
    loose = zoo.run(third, asking(1e-3), start)
    assert loose.success
    assert loose.x.dtype == jnp.float32
    tight = zoo.run(third, asking(1e-12), start)
    assert tight.status == Status.accuracy_floor
    np.testing.assert_allclose(tight.x, 1 / 3, atol=1e-3)


@every
def test_minimize_takes_it_with_trees(make):
    fun = LeastSquares(
        lambda x: {"a": x["p"][0] * jnp.arange(1.0, 3.0) - 2, "b": x["q"] - x["p"][0]}
    )
    result = tolerax.minimize(fun, {"p": np.ones(1), "q": np.float64(0)}, method=make())
    assert result.success
    # p [1, 2] = [2, 2] in the sense of least squares, q = p.
    np.testing.assert_allclose(result.x["p"], [1.2], atol=1e-6)
    np.testing.assert_allclose(result.x["q"], 1.2, atol=1e-6)
