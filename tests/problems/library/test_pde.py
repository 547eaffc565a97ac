"""P1, P2 and P4: their optima are optima, their bounds hold, their Hessians are right."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, Query
from tolerax.contracts import product
from tolerax.problems.library import coefficient_inversion, poisson_control, semilinear_control

N = 7
MAKE = {
    "poisson": lambda **options: poisson_control(N, **options),
    "poisson, small alpha": lambda **options: poisson_control(N, 1e-6, **options),
    "cubic": lambda **options: semilinear_control(N, **options),
    "bratu": lambda **options: semilinear_control(N, bratu=3.0, **options),
    "inversion": lambda **options: coefficient_inversion(N, **options),
}
TIGHT = Accuracy(1e-11, 1e-11)


@eqx.filter_jit
def evaluate(problem, x, accuracy):
    return problem.evaluate(Query(x, accuracy, derivatives=2))


@eqx.filter_jit
def times(hessian, v, tolerance):
    return product(hessian, v, tolerance)


def dual(problem, g):
    """The norm in which errors of gradients are measured."""
    return float(jnp.sqrt(jnp.vdot(g, problem.metric.solve(g))))


@pytest.fixture(scope="module", params=MAKE)
def example(request):
    return MAKE[request.param]()


def control(p):
    """A control that is not the optimum."""
    rng = np.random.default_rng(0)
    return 0.5 * p.optimum + 0.1 * jnp.asarray(rng.normal(size=p.x0.shape))


def test_the_optimum_is_one(example):
    p, size = example, example.optimum.size
    np.testing.assert_allclose(p.residual(p.state, p.optimum), 0, atol=1e-13)
    found = evaluate(p.problem, p.optimum, TIGHT)
    start = evaluate(p.problem, p.x0, TIGHT)
    assert dual(p.problem, found.gradient) <= 1e-8 * dual(p.problem, start.gradient)
    assert found.value < start.value
    units = jnp.eye(size).reshape(size, *p.x0.shape)
    matrix = jax.lax.map(lambda e: times(found.hessian, e, 1e-10).vector.ravel(), units)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-8 * np.abs(matrix).max())
    assert np.linalg.eigvalsh(matrix)[0] > 0


def test_every_error_is_below_its_bound_and_near_it(example):
    p = example
    x = control(p)
    truth = evaluate(p.problem, x, TIGHT)
    scale = dual(p.problem, truth.gradient)
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = evaluate(p.problem, x, Accuracy(tolerance, tolerance))
        slack = float(truth.gradient_error) + 1e-13 * scale
        error = dual(p.problem, found.gradient - truth.gradient)
        assert error <= float(found.gradient_error) + slack
        off = abs(float(found.value - truth.value))
        assert off <= float(found.value_error + truth.value_error) + 1e-14
        if found.provenance.certified:
            assert float(found.gradient_error) <= 20 * error + slack


def test_hessian_products_are_derivatives_of_the_gradient_to_their_tolerance(example):
    p = example
    x, rng = control(p), np.random.default_rng(1)
    v = jnp.asarray(rng.normal(size=p.x0.shape))
    at = evaluate(p.problem, x, TIGHT)
    exact = times(at.hessian, v, 1e-12)
    h = 1e-5
    ahead, behind = (evaluate(p.problem, x + s * h * v, TIGHT).gradient for s in (1, -1))
    difference = (ahead - behind) / (2 * h)
    np.testing.assert_allclose(
        exact.vector, difference, atol=1e-6 * float(jnp.max(jnp.abs(difference)))
    )
    works = []
    for tolerance in (1e-1, 1e-3):
        loose = times(at.hessian, v, tolerance)
        off = dual(p.problem, loose.vector - exact.vector)
        assert off <= float(loose.error + exact.error)
        works.append(int(loose.work.pde_solves))
    assert 0 < works[0] <= works[1] <= int(exact.work.pde_solves)
    # Without the second derivatives of the equation the product is nowhere against v.
    assert jnp.vdot(v, times(at.hessian.gauss_newton(), v, 1e-6).vector) > 0


def test_the_norm_of_a_solution_is_that_of_the_metric():
    p = poisson_control(N)
    solver = tolerax.InexactLineSearch(rtol=1e-3, atol=0.0)
    solution = tolerax.solve(p.problem, solver, p.x0)
    np.testing.assert_allclose(
        solution.gradient_norm, dual(p.problem, solution.gradient), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (poisson_control, {"n": 2}, "n is 2"),
        (poisson_control, {"alpha": 0.0}, r"alpha is 0\.0"),
        (semilinear_control, {"bratu": -1.0}, r"bratu is -1\.0"),
        (coefficient_inversion, {"sigma": 0.0}, r"sigma is 0\.0"),
        (poisson_control, {"metric": -1.0}, r"metric is -1\.0: give positive weights"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
