"""Ensemble Kalman inversion against the Kalman formulas and known minima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import LeastSquares, Status
from tolerax.solvers import EnsembleKalmanInversion

RNG = np.random.default_rng(0)
A, Y = jnp.asarray(RNG.normal(size=(8, 3))), jnp.asarray(RNG.normal(size=8))
LINEAR = LeastSquares(lambda x: A @ x - Y)
FIRST = jnp.asarray(RNG.normal(size=(30, 3)) * np.array([1.0, 0.5, 2.0]))


def run(problem, solver=None, start=None, **options):
    start = jnp.zeros(3) if start is None else start
    return tolerax.solve(problem, solver or EnsembleKalmanInversion(), start, **options)


@pytest.mark.parametrize("step", [None, 1.0, 0.3])
def test_the_posterior_of_linear_residuals_is_exact(step):
    """For the prior with the moments of the first ensemble, in any number of steps."""
    solver = EnsembleKalmanInversion(particles=30, posterior=True, ensemble=FIRST, step=step)
    solution = run(LINEAR, solver)
    m, C = np.mean(FIRST, axis=0), np.cov(FIRST.T)
    posterior = np.linalg.inv(np.linalg.inv(C) + A.T @ A)
    state = solution.state.solver_state
    np.testing.assert_allclose(state.covariance, posterior, rtol=1e-10)
    np.testing.assert_allclose(state.mean, m + posterior @ A.T @ (Y - A @ m), rtol=1e-9)
    assert solution.status == Status.sampled
    assert solution.success
    assert float(state.time) == pytest.approx(1, abs=1e-14)
    assert "not its mean" in solution.message


def test_a_point_that_fails_takes_no_part():
    """The others give the posterior of their own moments; the failed one is drawn from it."""
    broken = LeastSquares(lambda x: jnp.where(jnp.all(x == FIRST[7]), jnp.nan, A @ x - Y))
    solver = EnsembleKalmanInversion(particles=30, posterior=True, ensemble=FIRST, step=1.0)
    solution = run(broken, solver)
    others = np.delete(np.asarray(FIRST), 7, axis=0)
    posterior = np.linalg.inv(np.linalg.inv(np.cov(others.T)) + A.T @ A)
    x = solution.state.solver_state.x
    np.testing.assert_allclose(np.cov(np.delete(x, 7, axis=0).T), posterior, rtol=1e-10)
    assert int(solution.state.failures) == 1
    z = np.linalg.solve(np.linalg.cholesky(posterior), x[7] - np.delete(x, 7, axis=0).mean(axis=0))
    assert 0 < np.linalg.norm(z) < 6


def test_the_minimum_of_linear_residuals():
    solution = run(LINEAR)
    assert solution.status == Status.consensus
    np.testing.assert_allclose(solution.x, np.linalg.lstsq(A, Y)[0], atol=1e-4)


def test_probes_leave_the_span_of_the_first_ensemble():
    """All particles start on a line; the minimum is not on it."""
    centre = jnp.arange(6.0)
    first = jnp.linspace(0, 1, 6)[:, None] * jnp.ones(6)[None]
    problem = LeastSquares(lambda x: x - centre)
    line = EnsembleKalmanInversion(particles=6, ensemble=first)
    short = run(problem, line, jnp.zeros(6), max_steps=5)
    assert float(jnp.ptp(short.x)) < 1e-12
    long = run(problem, line, jnp.zeros(6), max_steps=2000)
    np.testing.assert_allclose(long.x, centre, atol=5e-2)


def test_rosenbrock_as_a_pytree_under_jit_and_vmap():
    problem = LeastSquares(lambda x: {"a": 10 * (x["v"] - x["u"] ** 2), "b": 1 - x["u"]})
    start = {"u": jnp.array(-1.2), "v": jnp.array(1.0)}
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.jit(jax.vmap(lambda key: run(problem, start=start, key=key)))(keys)
    assert bool(jnp.all(batch.status == Status.consensus))
    for leaf in jax.tree.leaves(batch.x):
        np.testing.assert_allclose(leaf, 1, atol=1e-2)


def test_bounds_are_kept_in_float32_and_simulators_may_fail():
    seen = []

    def simulator(x):
        seen.append(x)
        if x[0] > 0.9:
            raise RuntimeError("no convergence")
        return [x[0] - 0.5, x[1] - 3.0]

    problem = LeastSquares(simulator, host=True, size=2, on_error="fail", bounds=(-1.0, 1.0))
    start = jnp.zeros(2, jnp.float32)
    solution = run(problem, EnsembleKalmanInversion(particles=20), start, max_steps=200)
    assert solution.x.dtype == jnp.float32
    np.testing.assert_allclose(solution.x, [0.5, 1.0], atol=1e-2)
    points = np.array(seen)
    assert np.all(np.abs(points) <= 1)
    assert int(solution.state.failures) == int(np.sum(points[:, 0] > 0.9)) > 0
    assert int(solution.work.points) == len(seen)


def test_a_run_in_parts_gives_the_same_bits():
    whole = run(LINEAR, max_steps=12)
    rest = run(LINEAR, start=run(LINEAR, max_steps=5).state, max_steps=7)
    np.testing.assert_array_equal(rest.state.solver_state.x, whole.state.solver_state.x)


def test_all_failing_is_a_status():
    solution = run(LeastSquares(lambda x: x * jnp.nan))
    assert solution.status == Status.all_failed


def test_what_has_no_residuals_is_refused():
    with pytest.raises(TypeError, match="LeastSquares"):
        run(tolerax.Objective(lambda x: jnp.sum(x**2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"particles": 1}, "particles is 1"), ({"spread": -1.0}, "spread"), ({"step": 0.0}, "step")],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        EnsembleKalmanInversion(**fields)


def test_bad_ensembles_are_named():
    for ensemble in (jnp.zeros((5, 3)), {"x": FIRST}):
        solver = EnsembleKalmanInversion(particles=30, ensemble=ensemble)
        with pytest.raises(ValueError, match="ensemble has the shapes"):
            run(LINEAR, solver)
