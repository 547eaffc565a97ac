"""Consensus-based sampling against densities whose moments are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Objective, Status
from tolerax.solvers import ConsensusSampling
from tolerax.solvers._population import boltzmann, tempered

MEAN = jnp.array([1.0, -2.0])
COVARIANCE = jnp.array([[1.0, 0.6], [0.6, 0.5]])
PRECISION = jnp.linalg.inv(COVARIANCE)
GAUSSIAN = Objective(lambda x: 0.5 * (x - MEAN) @ PRECISION @ (x - MEAN) + 7)


def test_one_step_keeps_a_gaussian():
    """Of a sample of the density, a step makes another: moments within 5 standard errors."""
    n = 100_000
    normal = jax.random.normal(jax.random.key(1), (n, 2))
    first = normal @ jnp.linalg.cholesky(COVARIANCE).T + MEAN[None]
    for fields in ({"beta": 0.8}, {"share": 0.5, "keep": 0.6}):
        solver = ConsensusSampling(particles=n, ensemble=first, **fields)
        state = tolerax.solve(GAUSSIAN, solver, MEAN, max_steps=1).state.solver_state
        # The weights leave at least half of the particles, and the new ones are n.
        error = np.sqrt(3 / n)
        deviations = np.sqrt(np.diag(COVARIANCE))
        assert np.all(np.abs(state.mean - MEAN) < 5 * error * deviations)
        products = np.outer(deviations, deviations)
        assert np.all(np.abs(state.covariance - COVARIANCE) < 5 * np.sqrt(2) * error * products)
    assert float(state.effective) == pytest.approx(n / 2, rel=1e-3)


def test_the_ensemble_becomes_a_sample_and_says_so():
    """Twenty runs of 400 particles: their moments are those of the density on average."""
    solver = ConsensusSampling(particles=400)

    def moments(key):
        solution = tolerax.solve(GAUSSIAN, solver, jnp.zeros(2), key=key)
        state = solution.state.solver_state
        return state.mean, state.covariance, solution.status == Status.sampled

    mean, covariance, sampled = jax.vmap(moments)(jax.random.split(jax.random.key(0), 20))
    assert bool(jnp.all(sampled))
    # Averages over the runs, by their own standard errors; a bias of 2 % of the moments is known.
    for found, truth, scale in ((mean, MEAN, 0.02), (covariance, COVARIANCE, 0.02)):
        error = np.std(found, axis=0) / np.sqrt(19)
        assert np.all(np.abs(np.mean(found, axis=0) - truth) < 4 * error + scale)


def test_the_moments_have_the_form_of_x():
    problem = Objective(lambda x: 0.5 * jnp.sum((x["a"] - 1) ** 2) + 0.5 * x["b"] ** 2)
    start = {"a": jnp.zeros((2, 1)), "b": jnp.array(0.0)}
    solution = tolerax.solve(problem, ConsensusSampling(particles=50), start, max_steps=5)
    state = solution.state.solver_state
    assert state.ensemble["a"].shape == (50, 2, 1)
    assert state.mean["b"].shape == ()
    assert state.covariance.shape == (3, 3)
    np.testing.assert_allclose(state.mean["a"], np.mean(state.ensemble["a"], axis=0), rtol=1e-12)


def test_particles_that_fail_have_no_weight_and_come_back():
    """Half a plane has no values; the density lies in the other half but for 1 in 1000."""
    broken = Objective(lambda x: jnp.where(x[0] > 4.1, jnp.nan, GAUSSIAN.fun(x)))
    first = MEAN[None] + 5 * jax.random.normal(jax.random.key(0), (500, 2))
    solver = ConsensusSampling(particles=500, ensemble=first, keep=0.5)
    solution = tolerax.solve(broken, solver, MEAN, max_steps=200)
    state = solution.state.solver_state
    assert int(solution.state.failures) >= int(jnp.sum(first[:, 0] > 4.1)) > 20
    assert np.all(np.abs(state.mean - MEAN) < 0.3)
    assert solution.status in (Status.sampled, Status.budget)


def test_all_failing_is_a_status():
    problem = Objective(lambda x: x[0] * jnp.nan)
    solution = tolerax.solve(problem, ConsensusSampling(), jnp.zeros(2))
    assert solution.status == Status.all_failed


def test_more_unknowns_than_particles_do_no_harm():
    problem = Objective(lambda x: jnp.sum(x**2))
    solver = ConsensusSampling(particles=10)
    solution = tolerax.solve(problem, solver, jnp.ones(30), max_steps=20)
    assert bool(jnp.all(jnp.isfinite(solution.state.solver_state.x)))


def test_tempered_weights():
    energy = jnp.asarray(np.random.default_rng(0).exponential(size=80)).at[3].set(jnp.inf)
    beta, w = tempered(energy, 0.3)
    assert float(1 / jnp.sum(w**2)) == pytest.approx(0.3 * 79, rel=1e-6)
    np.testing.assert_allclose(w, boltzmann(energy, beta), rtol=1e-9)
    assert float(w[3]) == 0
    assert float(jnp.sum(w)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 1.0}, "share is 1.0"),
        ({"keep": 1.0}, "keep is 1.0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"settled": 0.0}, "settled is 0.0"),
        ({"particles": 1}, "particles is 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ConsensusSampling(**fields)
