"""The peers do what their papers say, on problems whose answers are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import soba
from benchmarks.dfols import dynamic_dfols, fista
from benchmarks.reference import Dense, both_levels, tight_loss
from benchmarks.sampled import levels
from tolerax.problems.library import digits_penalties, hyper_cleaning, quadratic

RNG = np.random.default_rng(0)


def ridge_levels(samples: int = 130, n: int = 3) -> tuple[soba.Level, soba.Level, jax.Array]:
    """Least squares with one log-penalty: the lower level has a closed form."""
    a = jnp.asarray(RNG.normal(size=(samples, n)))
    b = a @ jnp.ones(n) + jnp.asarray(RNG.normal(size=samples))
    half = samples // 2

    def terms(rows):
        return lambda y, x, i: 0.5 * (a[rows][i] @ y - b[rows][i]) ** 2

    lower = soba.Level(
        terms(slice(0, half)), lambda y, x: 0.5 * jnp.exp(x[0]) * jnp.sum(y**2), half, 1 / half
    )
    upper = soba.Level(
        terms(slice(half, samples)), lambda y, x: 1e-3 * x[0] ** 2, samples - half, 2 / samples
    )
    return upper, lower, jnp.zeros(n)


def test_minibatch_estimates_average_to_the_full_level():
    upper, lower, y = ridge_levels(151)  # 75 and 76 samples: the last batch is not full
    x = jnp.array([0.3])
    for level in (upper, lower):
        batches = soba.Batches.of(level.samples, 64, jax.random.key(0))
        parts = [soba.estimate(level, batches, jnp.array(b), y + 1, x) for b in range(2)]
        assert batches.blocks == 2
        np.testing.assert_allclose(np.mean(parts), level.full(y + 1, x), rtol=1e-12)


def test_saga_mean_is_the_mean_of_its_table():
    memory = (jnp.zeros((3, 2)), jnp.zeros(2))
    for k in range(7):
        term = jnp.asarray(RNG.normal(size=2))
        _, memory = soba.saga(term, memory, jnp.array(k % 3))
    np.testing.assert_allclose(memory[1], memory[0].mean(axis=0), atol=1e-15)
    # A term that has not changed since it was stored gives the mean itself.
    estimate, after = soba.saga(memory[0][1], memory, jnp.array(1))
    np.testing.assert_allclose(estimate, memory[1], atol=1e-15)
    np.testing.assert_array_equal(after[0], memory[0])


@pytest.mark.parametrize("variance_reduced", [False, True])
def test_soba_and_saba_find_the_penalty(variance_reduced):
    upper, lower, y0 = ridge_levels()
    dense = Dense(upper.full, lower.full)
    x0 = jnp.array([2.0])
    out = soba.run(
        upper, lower, y0, x0, jnp.array(0.1), jnp.array(0.2), jax.random.key(1),
        steps=20_000, variance_reduced=variance_reduced,
    )  # fmt: skip
    start, end = dense(x0, y0), dense(out.x, out.y)
    slope = abs(float(end.gradient[0])) / abs(float(start.gradient[0]))
    # The variance-reduced method converges at a constant step, the other to a neighbourhood.
    assert slope < (1e-6 if variance_reduced else 0.3)


def test_the_grid_reports_its_best_cell_and_divergence():
    upper, lower, y0 = ridge_levels()
    dense = Dense(upper.full, lower.full)
    x0 = jnp.array([2.0])
    tuned = soba.grid(
        upper, lower, y0, x0, lambda x, y: dense(x, y).value, cost=200, seed=3,
        ratios=(0.3, 1.0), steps=(0.1, 100.0), methods=("SABA",),
    )  # fmt: skip
    assert tuned.losses["SABA"][1] == [np.inf, np.inf]
    assert tuned.loss == min(tuned.losses["SABA"][0])
    assert tuned.best[:2] == ("SABA", 0.1)
    assert soba.steps_for(200, soba.Batches.of(lower.samples, 64, jax.random.key(0))) == 200


@pytest.mark.parametrize("make", [digits_penalties, hyper_cleaning])
def test_levels_over_samples_are_the_levels_of_the_library(make):
    ready = make(0)
    both, oracle = levels(ready), ready.problem.oracle
    y = jnp.asarray(0.1 * RNG.normal(size=(64, 10)))
    x = ready.x0 + jnp.asarray(RNG.normal(size=ready.x0.shape))
    np.testing.assert_allclose(both.upper.full(y, x), oracle.cost(y, x), rtol=1e-12)
    np.testing.assert_allclose(both.lower.full(y, x), oracle.potential(y, x), rtol=1e-12)


def test_reference_value_and_gradient_agree_with_the_closed_form():
    ready = quadratic(0, n=60, d=4)
    x = ready.x0 + 0.3
    truth = Dense.of(ready.problem)(x, ready.problem.oracle.y0)
    np.testing.assert_allclose(truth.value, ready.value(x), rtol=1e-10)
    np.testing.assert_allclose(truth.gradient, ready.gradient(x), rtol=1e-9)
    loss, y = tight_loss(*both_levels(ready.problem), x, ready.problem.oracle.y0)
    np.testing.assert_allclose(loss, ready.value(x), rtol=1e-7)
    np.testing.assert_allclose(y, ready.solution(x), rtol=1e-7)


def test_reference_gradient_agrees_with_differences_where_nothing_is_quadratic():
    ready = digits_penalties(0)
    dense = Dense.of(ready.problem)
    x = ready.x0 + jnp.asarray(RNG.normal(size=ready.x0.shape))
    u = jnp.asarray(RNG.normal(size=x.shape))
    truth = dense(x, ready.problem.oracle.y0)
    h = 1e-3
    difference = (dense(x + h * u, truth.y).value - dense(x - h * u, truth.y).value) / (2 * h)
    # Central differences err by h^2/6 times a third derivative of about the slope's size.
    np.testing.assert_allclose(difference, jnp.sum(u * truth.gradient), rtol=1e-5)


def smoothed_signal() -> tuple[jax.Array, jax.Array]:
    clean = np.repeat(RNG.normal(size=(4, 8)), 8, axis=1)
    return jnp.asarray(clean), jnp.asarray(clean + 0.2 * RNG.normal(size=clean.shape))


def test_fista_keeps_its_promise_at_the_rate_of_the_square_root():
    values = jnp.asarray(np.logspace(0, 4, 50))

    def lower(y, x):
        return 0.5 * jnp.sum(values * (y - x) ** 2)

    x = jnp.ones(50)
    answer = fista(lower, jnp.zeros(50), x, 1e4, 1.0, 1e-8)
    assert float(jnp.linalg.norm(answer.y - x)) <= 1e-8
    # Error and residual fall like (1 - 1/100)^k: from |H(y - x)| = 3e4 to 1e-8 within 2 * 2900.
    assert int(answer.iterations) < 5800
    assert int(fista(lower, answer.y, x, 1e4, 1.0, 1e-7).iterations) == 1


def test_dynamic_dfols_ties_accuracy_to_its_radius():
    clean, noisy = smoothed_signal()

    def lower(y, x):
        steps = jnp.sqrt(jnp.diff(y, axis=1) ** 2 + 0.01)
        return 0.5 * jnp.sum((y - noisy) ** 2) + jnp.exp(x[0]) * jnp.sum(steps)

    def residuals(y):
        return jnp.linalg.norm(y - clean, axis=1)

    trace = dynamic_dfols(
        residuals, lower, noisy, np.array([-5.0]), smoothness=lambda x: 1 + 40 * jnp.exp(x[0]),
        strong_convexity=lambda x: jnp.ones(()), max_evaluations=25, accuracy=0.05, radius=0.5,
    )  # fmt: skip
    losses = [float(jnp.sum(residuals(one.y) ** 2)) for one in trace]
    assert trace[0].tolerance == pytest.approx(0.05 * 0.5**2)
    assert min(one.tolerance for one in trace) < trace[0].tolerance / 4
    assert all(a.cost < b.cost for a, b in itertools.pairwise(trace))
    best = min(
        float(jnp.sum(residuals(tight_loss(lower, lower, jnp.array([t]), noisy)[1]) ** 2))
        for t in np.linspace(-5, 1, 25)
    )
    assert min(losses) <= 1.02 * best
