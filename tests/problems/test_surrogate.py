"""Functions of a network's output: derivatives, precision, guards and the simulator."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, NeuralSurrogate, PointStatus, Query

ASK = Accuracy(0.1, 0.1)
X = jnp.array([0.3, -0.6])


def mlp(seed=0, dtype=None):
    return eqx.nn.MLP(2, 3, 8, 1, jnp.tanh, dtype=dtype, key=jax.random.key(seed))


NETWORK = mlp()


def objective(z, x):
    return z[0] * z[1] + jnp.sum(x**2)


def constraints(z, x):
    return {"out": z[2], "in": x[0] + x[1]}


def evaluate(problem, *args, **options) -> Any:
    return problem.evaluate(Query(*args, **options))


def test_values_and_derivatives_are_those_of_the_composition():
    problem = NeuralSurrogate(NETWORK, objective, constraints=constraints)
    answer = evaluate(problem, X, ASK, derivatives=2)
    whole = lambda x: objective(NETWORK(x), x)  # noqa: E731
    limits = lambda x: jnp.stack([x[0] + x[1], NETWORK(x)[2]])  # noqa: E731
    np.testing.assert_allclose(answer.value, whole(X), rtol=1e-14)
    np.testing.assert_allclose(answer.gradient, jax.grad(whole)(X), rtol=1e-12)
    v = jnp.array([1.0, 2.0])
    found = answer.jacobian.mv(v)["constraints"]
    np.testing.assert_allclose([found["in"], found["out"]], jax.jacobian(limits)(X) @ v)
    w = {"constraints": {"in": jnp.array(0.5), "out": jnp.array(-2.0)}}
    curved = jax.hessian(lambda x: whole(x) + limits(x) @ jnp.array([0.5, -2.0]))(X) @ v
    np.testing.assert_allclose(answer.hessian.mv(v, w), curved, rtol=1e-12)
    np.testing.assert_allclose(answer.violation, jnp.maximum(jnp.max(limits(X)), 0))


def test_a_batch_answers_as_its_points_and_counts_passes():
    problem = NeuralSurrogate(NETWORK, objective, constraints=constraints)
    points = jnp.stack([X, -X, 2 * X])
    mask = jnp.array([True, False, True])
    batch = evaluate(problem, points, ASK, mask=mask, derivatives=1)
    assert batch.work.as_dict() == {
        "points": 2,
        "values": 2,
        "gradients": 2,
        "network_passes": 4,
    }
    one = evaluate(problem, points[2], ASK, derivatives=1)
    np.testing.assert_allclose(batch.value[2], one.value, rtol=1e-14)
    np.testing.assert_allclose(batch.violation[2], one.violation, rtol=1e-14)
    np.testing.assert_allclose(batch.gradient[2], one.gradient, rtol=1e-12)


def test_to_maximize_is_to_minimize_the_negative():
    least = evaluate(NeuralSurrogate(NETWORK, objective), X, ASK)
    most = evaluate(NeuralSurrogate(NETWORK, objective, maximize=True), X, ASK)
    assert float(most.value) == -float(least.value)
    np.testing.assert_array_equal(most.gradient, -least.gradient)


@pytest.mark.parametrize("derivatives", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_the_error_bounds_what_a_coarse_output_loses(dtype, derivatives):
    """An exact network whose output is rounded; the objective is linear in it, so first order is
    all there is."""
    weights = jnp.array([3.0, -200.0, 0.1])
    network = lambda x: (NETWORK(x) * jnp.array([1.0, 0.01, 30.0])).astype(dtype)  # noqa: E731
    problem = NeuralSurrogate(network, lambda z, x: jnp.sum(weights * z))
    truth = NeuralSurrogate(
        lambda x: NETWORK(x) * jnp.array([1.0, 0.01, 30.0]), lambda z, x: jnp.sum(weights * z)
    )
    for x in jax.random.normal(jax.random.key(3), (20, 2)):
        found = evaluate(problem, x, ASK, derivatives=derivatives)
        gap = abs(float(found.value - evaluate(truth, x, ASK, derivatives=0).value))
        assert 0 < gap <= float(found.value_error)
        # Rounding to nearest loses at most half of eps, and parts may cancel.
        assert float(found.value_error) < 1e3 * float(jnp.finfo(dtype).eps)


def test_a_network_without_an_answer_fails_the_point():
    network = lambda x: jnp.where(x[0] > 1, jnp.nan, 1.0) * NETWORK(x)  # noqa: E731
    answer = evaluate(NeuralSurrogate(network, objective), 2 + X, ASK)
    assert bool(answer.status == PointStatus.failed)


def test_x_stays_within_bounds_and_trust():
    box = NeuralSurrogate(
        NETWORK, objective, bounds=(-np.inf, np.array([1.0, 5.0])), trust=(-2.0, 2.0)
    ).bounds
    assert box is not None
    np.testing.assert_array_equal(box[0], -2.0)
    np.testing.assert_array_equal(box[1], [1.0, 2.0])
    tree = NeuralSurrogate(
        lambda x: x["a"], lambda z, x: z, bounds=({"a": 0.0}, {"a": 3.0}), trust=(-1.0, 2.0)
    ).bounds
    assert jax.tree.map(float, tree) == ({"a": 0.0}, {"a": 2.0})
    with pytest.raises(ValueError, match="what bounds and trust have in common: the lower bound"):
        NeuralSurrogate(NETWORK, objective, bounds=(3.0, 4.0), trust=(-1.0, 1.0))


def test_networks_are_believed_where_they_agree():
    """Three networks that learned a line, and diverge beyond its data: unguarded, the optimum of
    their mean is at the end of the box."""
    slopes = (-1.0, 0.0, 4.0)
    networks = [lambda x, s=s: x[0] + s * jnp.maximum(x[0] - 1, 0) for s in slopes]
    plain = NeuralSurrogate(networks, lambda z, x: z, maximize=True, trust=(0.0, 5.0))
    guarded = NeuralSurrogate(
        networks, lambda z, x: z, maximize=True, trust=(0.0, 5.0), max_disagreement=0.2
    )
    spread = float(np.std(slopes))
    answer = evaluate(guarded, jnp.array([3.0]), ASK)
    np.testing.assert_allclose(answer.violation, 2 * spread - 0.2, rtol=1e-12)
    best = tolerax.solve(plain, tolerax.InexactLineSearch(), jnp.array([0.5]))
    assert float(best.x[0]) == 5.0
    best = tolerax.solve(guarded, tolerax.CBO(particles=40), jnp.array([0.5]), max_steps=300)
    assert float(best.violation) <= 1e-6
    # Disagreement reaches 0.2 at 1 + 0.2 / spread.
    np.testing.assert_allclose(best.x, [1 + 0.2 / spread], atol=0.01)


def test_networks_that_agree_have_a_gradient():
    guarded = NeuralSurrogate([NETWORK, NETWORK], objective, max_disagreement=0.1)
    answer = evaluate(guarded, X, ASK, derivatives=1)
    assert bool(jnp.all(jnp.isfinite(answer.jacobian.mv(jnp.ones(2))["disagreement"])))


def test_the_simulator_says_what_an_optimum_is_worth():
    problem = NeuralSurrogate(
        NETWORK,
        objective,
        constraints=lambda z, x: z[2],
        constraint_bounds=(-1.0, 1.0),
        maximize=True,
        simulator=lambda x: np.asarray([2.0, 3.0, 1.5]),
    )
    seen = problem.recheck(X)
    assert seen.value == pytest.approx(6.0 + float(X @ X))
    assert seen.predicted_value == pytest.approx(float(objective(NETWORK(X), X)))
    assert seen.violation == pytest.approx(0.5)
    gap = jnp.max(jnp.abs(jnp.array([2.0, 3.0, 1.5]) - NETWORK(X)))
    assert seen.output_error == pytest.approx(float(gap))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_disagreement": 0.1}, r"0.1 with 1 network\(s\)"),
        ({"network": [NETWORK, NETWORK], "max_disagreement": 0.0}, "max_disagreement is 0.0"),
        ({"constraint_bounds": (0.0, 1.0)}, "without constraints"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        NeuralSurrogate(**({"network": NETWORK, "objective": objective} | options))


def test_what_does_not_fit_is_named():
    with pytest.raises(TypeError, match="give a callable or a list"):
        NeuralSurrogate([], objective)
    with pytest.raises(TypeError, match=r"returned float64\[3\]: it must return a float scalar"):
        evaluate(NeuralSurrogate(NETWORK, lambda z, x: z), X, ASK)
    with pytest.raises(ValueError, match="there is no simulator"):
        NeuralSurrogate(NETWORK, objective).recheck(X)
    wrong = NeuralSurrogate(NETWORK, objective, simulator=lambda x: np.zeros(2))
    with pytest.raises(ValueError, match="the simulator returned shapes"):
        wrong.recheck(X)


def called_back(x):
    shape = jax.ShapeDtypeStruct((2,), jnp.float64)
    return jax.pure_callback(lambda v: np.sin(v), shape, x, vmap_method="sequential")


def test_a_network_without_derivatives_is_named():
    problem = NeuralSurrogate(called_back, lambda z, x: jnp.sum((z - 0.3) ** 2), trust=(-2.0, 2.0))
    x, ask = jnp.ones(2), Accuracy(1e-6, 1e-6)
    with pytest.raises(TypeError, match=r"the network gives none.*DirectionalAttack"):
        problem.evaluate(Query(x, ask, None, derivatives=1))
    value = problem.evaluate(Query(x, ask, None, derivatives=0)).value
    np.testing.assert_allclose(value, 2 * (np.sin(1.0) - 0.3) ** 2, rtol=1e-12)


class Foreign:
    """Like a torch module."""

    def __call__(self, x):
        raise TypeError("linear(): argument 'input' must be Tensor, not DynamicJaxprTracer")


@pytest.mark.parametrize("network", [lambda x: np.sin(np.asarray(x)), Foreign()])
def test_code_that_cannot_be_traced_is_named(network):
    problem = NeuralSurrogate(network, lambda z, x: jnp.sum(z**2), trust=(-2.0, 2.0))
    with pytest.raises(TypeError, match=r"JAX cannot trace the network.*jax\.pure_callback"):
        tolerax.solve(problem, tolerax.CDSM(), jnp.ones(2), max_steps=5)


def test_a_simulator_without_an_answer_confirms_nothing():
    def rechecked(simulator):
        NeuralSurrogate(jnp.sin, lambda z, x: jnp.sum(z), simulator=simulator).recheck(jnp.zeros(2))

    with pytest.raises(ValueError, match=r"is not finite: what the networks say there"):
        rechecked(lambda x: np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match=r"the simulator raised ZeroDivisionError.* at x = "):
        rechecked(lambda x: 1 / 0)
