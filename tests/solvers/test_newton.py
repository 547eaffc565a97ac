"""Inexact Newton on equations: exact optima, grids, bounds, failing state solves."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance.zoo import name_of
from tolerax import InexactNewton, Work
from tolerax.contracts import Product, exact_evaluation
from tolerax.inner import Laplacian, Metric
from tolerax.problems.library import (
    coefficient_inversion,
    poisson_control,
    quadratic,
    semilinear_control,
)

pytestmark = pytest.mark.accelerator


def test_a_quadratic_problem_takes_one_step_whatever_the_grid():
    products = []
    for n in (7, 15):
        p = poisson_control(n)
        solver = InexactNewton(rtol=1e-9, atol=0.0, forcing=1e-10)
        solution = tolerax.solve(p.problem, solver, p.x0)
        assert name_of(solution.status) == "converged"
        # Start, one step, and the second look.
        assert int(solution.steps) == 3
        # |u - optimum| is at most |gradient| / alpha.
        assert p.distance(solution.x) <= float(solution.gradient_norm) / 1e-4 + 1e-10
        products.append(int(solution.state.solver_state.model.products))
    assert abs(products[1] - products[0]) <= 2


def test_the_semilinear_optimum_is_found_with_loose_solves_that_tighten():
    p = semilinear_control(15)
    solution = tolerax.solve(p.problem, InexactNewton(rtol=1e-7, atol=0.0), p.x0)
    # The constant of the curvature is given, not proved, which is the user's word.
    assert solution.success
    assert p.distance(solution.x) <= 1e-5
    rows = solution.history.rows()
    assert rows["state_tolerance"][0] > 1e3 * rows["state_tolerance"][-1]
    assert int(solution.work.pde_solves) < 300


def test_gauss_newton_and_newton_find_the_coefficient():
    p = coefficient_inversion(7)
    for gauss_newton in (False, True):
        solver = InexactNewton(rtol=1e-7, atol=0.0, gauss_newton=gauss_newton)
        solution = tolerax.solve(p.problem, solver, p.x0)
        assert name_of(solution.status) == "converged_estimated"
        assert p.distance(solution.x) <= 1e-4
        assert int(solution.steps) <= 15


def test_bounds_on_the_control_hold_and_the_optimum_is_that_of_the_line_search():
    p = poisson_control(7, bounds=(-5.0, 8.0))
    found = [
        tolerax.solve(p.problem, kind(rtol=1e-9, atol=0.0), p.x0)
        for kind in (InexactNewton, tolerax.InexactLineSearch)
    ]
    for solution in found:
        assert solution.success
        assert np.all((solution.x >= -5.0) & (solution.x <= 8.0))
    assert np.sum(np.asarray(found[0].x) == 8.0) > 3
    np.testing.assert_allclose(found[0].x, found[1].x, atol=1e-4)
    assert int(found[0].steps) < int(found[1].steps)


def test_bilevel_problems_work_too():
    p = quadratic(n=50, d=3)
    solution = tolerax.solve(p.problem, InexactNewton(), p.x0)
    assert solution.success
    np.testing.assert_allclose(solution.x, p.optimum, atol=1e-4)


def test_negative_curvature_is_followed():
    # From next to a maximum along x[0], the Hessian is indefinite until |x[0]| > 1 / sqrt(3).
    well = tolerax.Objective(lambda x: 0.25 * (x[0] ** 2 - 1) ** 2 + 5 * x[1] ** 2)
    solution = tolerax.solve(well, InexactNewton(), jnp.array([1e-3, 0.5]))
    assert solution.success
    assert int(solution.state.solver_state.model.negative) > 0
    np.testing.assert_allclose(jnp.abs(solution.x), jnp.array([1.0, 0.0]), atol=1e-6)


def test_a_state_that_does_not_exist_shortens_the_step():
    # Towards the target the source pushes Bratu's equation past its turning point.
    p = semilinear_control(7, 1e-4, bratu=6.5)
    solution = tolerax.solve(p.problem, InexactNewton(rtol=1e-6, atol=0.0), p.x0, max_steps=60)
    rows = solution.history.rows()
    # The third answer is the trial of a full step: nothing bounds its error. A hundredth is right.
    assert [i for i, error in enumerate(rows["value_error"]) if error == np.inf] == [2]
    assert rows["step_size"][2] < 0.1
    assert rows["iteration"][3] == rows["iteration"][1] + 1
    assert np.all(np.diff(rows["best_value"]) <= 0)
    assert name_of(solution.status) == "converged_estimated"
    assert p.distance(solution.x) <= 1e-3
    # No state at all where the run begins: nothing is claimed.
    beyond = semilinear_control(7, 1e-4, bratu=40.0)
    far = tolerax.solve(beyond.problem, InexactNewton(), 200 + 0 * p.x0, max_steps=60)
    assert name_of(far.status) == "non_finite_start"
    assert int(far.steps) == 1


def test_a_preconditioner_that_is_not_positive_is_detected():
    laplacian = Laplacian((7, 7))
    p = poisson_control(7, linear_solver=None, riesz=lambda u: lambda r: -laplacian.solve(r))
    solution = tolerax.solve(p.problem, InexactNewton(), p.x0, max_steps=30)
    assert not solution.success
    assert name_of(solution.status) in ("inner_failed", "non_finite_start")


class Measured(tolerax.Problem):
    """`|x - 1|^2 / 2` in a metric."""

    metric: Metric
    bounds: tuple | None = None

    def evaluate(self, query):
        left = query.x - 1
        found = exact_evaluation(left @ left / 2, left, Work(points=1))
        return dataclasses.replace(found, metric=self.metric)


def test_a_metric_of_the_wrong_sign_certifies_nothing():
    metric = Metric(lambda v: -v, lambda g: -g)
    solution = tolerax.solve(Measured(metric), tolerax.InexactLineSearch(), jnp.zeros(2))
    assert name_of(solution.status) == "inner_failed"
    assert "`metric` is not positive definite" in solution.message


@pytest.mark.parametrize("name", ["forcing", "hessian_share"])
def test_shares_lie_between_0_and_1(name):
    with pytest.raises(ValueError, match=f"{name} is 2"):
        InexactNewton(**{name: 2.0})


def test_needs_second_derivatives():
    with pytest.raises(ValueError, match="no Gauss-Newton operator"):
        tolerax.solve(
            tolerax.Objective(lambda x: jnp.sum(x**2)),
            InexactNewton(gauss_newton=True),
            jnp.ones(2),
        )
    with pytest.raises(TypeError, match=r"give `gradient` \(`jac`\), `hessian`"):
        tolerax.minimize(lambda x: float(sum(x**2)), [1.0, 2.0], method="newton", jac="2-point")


class Careless(eqx.Module):
    """Products with a matrix that are as wrong as the tolerance allows, and not symmetric."""

    matrix: jax.Array
    turn: jax.Array

    def product(self, vector, tolerance):
        exact = self.matrix @ vector
        error = (
            tolerance * jnp.linalg.norm(exact) * (self.turn @ (vector / jnp.linalg.norm(vector)))
        )
        return Product(exact + error, jnp.linalg.norm(error), Work(hessian_products=1))


class Quadratic(tolerax.Problem):
    """`x.Hx / 2 - sum(x)` with such products."""

    hessian: Careless
    bounds: tuple | None = None

    def evaluate(self, query):
        hx = self.hessian.matrix @ query.x
        value, gradient = query.x @ hx / 2 - jnp.sum(query.x), hx - 1
        return exact_evaluation(value, gradient, Work(points=1), hessian=self.hessian)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_wrong_products_cost_few_more_than_exact_ones(share):
    n, rng = 12, np.random.default_rng(5)
    q, turn = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    matrix = (q * np.logspace(0, 2, n)[None]) @ q.T
    problem = Quadratic(Careless(jnp.asarray(matrix), jnp.asarray(turn)))
    solver = InexactNewton(rtol=1e-8, atol=0.0, forcing=1e-4, hessian_share=share)
    solution = tolerax.solve(problem, solver, jnp.zeros(n))
    assert solution.success
    np.testing.assert_allclose(matrix @ np.asarray(solution.x), 1.0, atol=1e-7)
    # Exact products end after n of them a direction, and two directions take the gradient to 1e-8;
    # four losses of conjugacy begin again with products of 3e-5.
    assert int(solution.work.hessian_products) <= 6 * n
