"""P3 and P5: the gradient of the heat equation is its formula, the optima are optima, and
trajectories are not stored."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax import Accuracy, Query
from tolerax.inner import MINRES, BiCGStab
from tolerax.problems.library import burgers_control, heat_initial_condition

TIGHT = Accuracy(1e-12, 1e-12)


@eqx.filter_jit
def evaluate(problem, x, accuracy):
    return problem.evaluate(Query(x, accuracy))


def test_heat_gradient_is_its_formula_and_no_trajectory_is_stored():
    n, steps = 15, 144
    p = heat_initial_condition(n, steps, store_up_to=0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=p.x0.shape))
    whole = eqx.filter_jit(lambda p, x: p.evaluate(Query(x, TIGHT)))
    compiled = whole.lower(p.problem, x).compile()
    np.testing.assert_allclose(compiled(p.problem, x).gradient, p.gradient(x), atol=1e-13)
    assert float(p.problem.dual_norm(p.gradient(p.optimum))) < 1e-14
    # States, their errors and residuals at all steps would take three times as many numbers.
    assert compiled.compiled.memory_analysis().temp_size_in_bytes < 8 * steps * n**2


def test_heat_errors_are_below_their_bounds():
    # Steps are solved approximately, with another diffusion as the preconditioner.
    other = heat_initial_condition(5, 12, kappa=0.05).problem.method.preconditioner
    p = heat_initial_condition(5, 12, linear_solver=MINRES(), preconditioner=other)
    x = jnp.asarray(np.random.default_rng(0).normal(size=p.x0.shape))
    for tolerance in (1e-2, 1e-4):
        found = evaluate(p.problem, x, Accuracy(tolerance, tolerance))
        error = float(p.problem.dual_norm(found.gradient - p.gradient(x)))
        assert 1e-12 < error <= found.gradient_error <= 20 * error


def test_burgers_optimum_is_one():
    p = burgers_control(9, 8, linear_solver=BiCGStab())
    found = evaluate(p.problem, p.optimum, TIGHT)
    start = evaluate(p.problem, p.x0, TIGHT)
    assert p.problem.dual_norm(found.gradient) <= 1e-10 * p.problem.dual_norm(start.gradient)
    assert found.value < start.value
    assert float(p.distance(p.optimum)) == 0


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (heat_initial_condition, {"kappa": 0.0}, r"kappa is 0\.0"),
        (heat_initial_condition, {"steps": 0}, "steps is 0"),
        (burgers_control, {"nu": -1.0}, r"nu is -1\.0"),
        (burgers_control, {"n": 2}, "n is 2"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
