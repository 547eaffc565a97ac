"""Ready-made problems over trained networks, with little training: what they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, Query
from tolerax.problems.library import digits_counterfactual, image_mixture, reactor
from tolerax.problems.library.surrogates import Reactor
from tolerax.problems.library.trained import train

ASK = Accuracy(0.1, 0.1)


@pytest.fixture(scope="module")
def mixture():
    return image_mixture(20, steps=60)


@pytest.fixture(scope="module")
def counterfactual():
    return digits_counterfactual(8, steps=90)


def test_training_finds_the_minimizer_of_a_regression():
    x = jax.random.normal(jax.random.key(0), (200, 3))
    truth = jnp.array([1.0, -2.0, 0.5])
    loss = lambda w, items, key: jnp.mean((items[0] @ w - items[1]) ** 2)  # noqa: E731
    found = train(jnp.zeros(3), loss, (x, x @ truth), key=jax.random.key(1), steps=800, rate=0.05)
    # The data are consistent, so noise vanishes at the minimizer.
    np.testing.assert_allclose(found, truth, atol=1e-3)


def test_the_target_of_a_mixture_is_in_reach(mixture):
    problem, n = mixture.problem, mixture.x0.size
    same = jnp.all(mixture.image.images == mixture.original[None], axis=(1, 2))
    one = jnp.where(same, 10.0, -10.0)
    at_target = problem.evaluate(Query(one, ASK, derivatives=0))
    start = problem.evaluate(Query(mixture.x0, ASK, derivatives=0))
    # The other images keep a weight of n e^-20.
    assert float(at_target.value) < (n * np.exp(-20.0)) ** 2 * 1e6
    assert float(start.value) > 1e-2
    assert mixture.optimum == 0.0
    np.testing.assert_allclose(mixture.image(one), mixture.original, atol=1e-6)


def test_a_counterfactual_starts_on_the_shell_and_in_another_class(counterfactual):
    answer = counterfactual.problem.evaluate(Query(counterfactual.x0, ASK, derivatives=1))
    assert float(answer.value) == 0.0
    limits = answer.constraints["constraints"]
    assert float(limits["shell"]) == pytest.approx(-1.0, abs=1e-6)
    assert float(limits["class"]) >= 1.0  # the margin, and what the class lacks
    assert float(answer.violation) == float(limits["class"])
    assert counterfactual.image(counterfactual.x0).shape == (8, 8)


def test_the_reactor_keeps_its_balances():
    """All of A, B and C together are constant; the walls cool; without a reaction to speak of A
    decays as the exponential says."""
    z = Reactor()(jnp.array([0.5, 0.4]))
    np.testing.assert_allclose(jnp.sum(z[:3], axis=0), 2.0, rtol=1e-6)
    coolant, duration = Reactor().controls(jnp.array([0.5, 0.4]))
    assert float(coolant) == 320.0
    assert float(duration) == pytest.approx(2.7)
    assert bool(jnp.all(z[3] >= 320.0))
    # At the temperature of the end the rate of A is k1 cA.
    finer = Reactor()(jnp.array([0.5, 0.4 + 1e-4]))
    slope = (finer[0, -1] - z[0, -1]) / (5.5e-4)
    rate = -jnp.exp(70e3 / 8.314 * (1 / 320.0 - 1 / z[3, -1])) * z[0, -1]
    np.testing.assert_allclose(slope, rate, rtol=1e-2)


def test_the_reactor_is_rechecked_by_its_simulator():
    made = reactor(samples=10, steps=5)
    seen = made.problem.recheck(made.x0)
    z = Reactor()(made.x0)
    expected = float(Reactor().productivity(z, made.x0))
    assert seen.value == pytest.approx(expected)
    assert seen.output_error > 0
    answer = made.problem.evaluate(Query(made.x0, ASK, derivatives=0))
    assert float(answer.value) == pytest.approx(-seen.predicted_value)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: image_mixture(1), "n is 1: give an integer from 2 to 500"),
        (lambda: digits_counterfactual(1), "n is 1"),
        (lambda: reactor(samples=0), "samples is 0"),
        (lambda: reactor(seed=-1), "seed is -1"),
    ],
)
def test_bad_sizes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_exact_gradients_reach_the_target(mixture):
    solution = tolerax.solve(
        mixture.problem, tolerax.InexactLineSearch(), mixture.x0, max_work={"points": 150}
    )
    assert float(solution.value) < 1e-4
