"""Consensus hopping and consensus freezing against what they are defined as."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from benchmarks.cbo_hopping import sigmas
from tolerax import Objective, Status
from tolerax.solvers import (
    ConsensusFreezing,
    ConsensusHopping,
    Polarized,
    SoftConsensus,
)
from tolerax.solvers.freezing import Frozen

SPHERE = Objective(lambda x: jnp.sum((x - 1) ** 2))


def test_a_hop_is_the_implicit_gradient_step():
    """The mean square of 20 runs and 60 coordinates, each of mean 1, has standard deviation 0.18;
    a self-normalized mean of 1e5 particles is biased by less than 0.01 of its standard error."""
    found = [float(sigmas(jax.random.key(k), 3, 5.0, 100_000)) for k in range(20)]
    assert np.mean(np.square(found)) == pytest.approx(1, abs=0.6)


def test_the_first_particle_is_the_point_itself_and_has_no_weight():
    solver = ConsensusHopping(particles=50, consensus=SoftConsensus(1e4))
    # The start is the minimum, so with a weight it would be the consensus.
    solution = tolerax.solve(SPHERE, solver, jnp.ones(3), max_steps=1)
    assert float(solution.value) == 0
    assert float(jnp.max(jnp.abs(solution.state.solver_state.x - 1))) > 1e-3


def test_a_fixed_width_stays_and_a_factor_shrinks_it():
    for shrink in (1.0, 0.9):
        solver = ConsensusHopping(particles=50, spread=0.3, shrink=shrink)
        solution = tolerax.solve(SPHERE, solver, jnp.zeros(2), max_steps=20)
        rows = solution.history.rows()
        np.testing.assert_allclose(rows["spread"][1:] / rows["spread"][:-1], shrink, rtol=1e-12)
    assert solution.status == Status.budget


def test_the_width_grows_on_a_slope_and_falls_at_a_minimum():
    solver = ConsensusHopping(particles=50, spread=0.01)
    slope = tolerax.solve(Objective(lambda x: x[0] + 2 * x[1]), solver, jnp.zeros(2), max_steps=30)
    assert slope.history.rows()["spread"][-1] > 0.1
    there = tolerax.solve(SPHERE, dataclasses.replace(solver, spread=1.0), jnp.ones(2))
    assert there.status == Status.consensus
    assert there.history.rows()["spread"][-1] <= 2e-4


def test_the_width_has_the_shape_of_x():
    start = {"a": jnp.zeros(2), "b": jnp.array(5.0)}
    solver = ConsensusHopping(particles=400, spread={"a": 1e-3, "b": 2.0})
    first = []
    problem = Objective(lambda x: jnp.sum(x["a"] ** 2) + x["b"] ** 2)
    tolerax.solve(
        problem, solver, start, max_steps=1, callback=lambda step: first.append(step.query.x)
    )
    # The standard deviation of 800 and of 400 numbers is within 10 % but once in 10,000 times.
    assert float(jnp.std(first[0]["a"])) == pytest.approx(1e-3, rel=0.1)
    assert float(jnp.std(first[0]["b"])) == pytest.approx(2.0, rel=0.15)


def test_a_cloud_that_fails_is_drawn_closer():
    """Only a ball of radius 0.05 has values: the first clouds, of width 1, miss it."""
    ball = Objective(
        lambda x: jnp.where(jnp.sum(x**2) < 0.05**2, jnp.sum((x - 0.01) ** 2), jnp.nan)
    )
    solution = tolerax.solve(ball, ConsensusHopping(particles=30), jnp.zeros(5), max_steps=500)
    assert solution.status == Status.consensus
    np.testing.assert_allclose(solution.x, 0.01, atol=2e-3)


def test_freezing_has_the_moments_of_the_exact_flow():
    """Mean exp(-lambda T) u and variance u^2 e^(-2 lambda T) (e^(s^2) - 1) + w^2 (1 - e^(-2 lambda
    T)) in every coordinate, however long the step."""
    n, s, decay, width = 200_000, 0.5, 1.5, 0.3
    u = jnp.broadcast_to(jnp.array([[2.0, -1.0, 0.5]]), (n, 3))
    scale = jnp.array([1.0, 2.0, 3.0])
    noise = Frozen(decay, s, width, 1.0)
    weights = jnp.full(n, 1 / n)
    moved = noise(jax.random.key(0), u, 0 * u, scale, weights, jnp.array(width))
    variance = u[0] ** 2 * np.exp(-2 * decay) * np.expm1(s**2)
    variance = variance + (width * scale) ** 2 * -np.expm1(-2 * decay)
    error = np.sqrt(variance / n)
    assert np.all(np.abs(np.mean(moved, axis=0) - np.exp(-decay) * u[0]) < 5 * error)
    # The standard error of a variance is sqrt((kurtosis - 1) / n) of it; the kurtosis is below 8.
    np.testing.assert_allclose(np.var(moved, axis=0), variance, rtol=5 * np.sqrt(7 / n))


def test_freezing_is_stable_for_long_steps():
    """Where `x <- x - 4 (x - m)` would triple the distances in every step."""
    frozen = ConsensusFreezing(interval=4.0, sigma=0.25)
    solution = tolerax.solve(SPHERE, frozen, jnp.full(5, 3.0), max_steps=100)
    assert float(jnp.max(jnp.abs(solution.state.solver_state.x - 1))) < 2


def test_freezing_for_ever_is_hopping():
    """Where nothing is remembered the cloud is normal about the consensus."""
    solver = ConsensusFreezing(particles=20_000, interval=40.0, sigma=0.0, width=0.2, shrink=1.0)
    solution = tolerax.solve(SPHERE, solver, jnp.zeros(2), max_steps=1)
    state = solution.state.solver_state
    spread = state.scale * 0.2
    z = np.asarray((state.x - state.consensus[None]) / spread[None])
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=5 / np.sqrt(20_000))
    np.testing.assert_allclose(np.cov(z.T), np.eye(2), atol=5 * np.sqrt(2 / 20_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConsensusHopping(particles=1), "particles is 1"),
        (lambda: ConsensusHopping(spread=0.0), "spread is 0.0"),
        (lambda: ConsensusHopping(shrink=-1.0), "shrink is -1.0"),
        (lambda: ConsensusHopping(tol=0.0), "tol is 0.0"),
        (lambda: ConsensusFreezing(interval=0.0), "interval is 0.0"),
        (lambda: ConsensusFreezing(spread=0.0), "spread is 0.0"),
        (lambda: ConsensusFreezing(patience=-1), "patience is -1"),
        (lambda: ConsensusFreezing(sigma=-1.0), "sigma is -1.0"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_consensus_for_each_particle_is_refused():
    with pytest.raises(ValueError, match="not Polarized"):
        tolerax.solve(SPHERE, ConsensusHopping(consensus=Polarized()), jnp.zeros(2), max_steps=1)


def test_constraints_are_refused():
    problem = tolerax.Objective(SPHERE.fun, constraints=lambda x: x[0])
    with pytest.raises(ValueError, match="ConsensusHopping does not look at constraints"):
        tolerax.solve(problem, ConsensusHopping(particles=3), jnp.zeros(2))
