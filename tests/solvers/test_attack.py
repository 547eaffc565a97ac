"""Directional attacks: what is asked, zero gradients, constraints, and the turns of the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import DirectionalAttack, NeuralSurrogate, Objective, Query, Status
from tolerax.inner.particles import first_differentiated

ALONE = DirectionalAttack(then=())


def bowl(x):
    return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * (x - jnp.array([0.5, -0.25, 0.1])) ** 2)


def test_only_the_first_point_of_a_batch_is_differentiated():
    problem = Objective(bowl, constraints=lambda x: x[0] * x[1])
    points = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([True, True, False])
    query = Query(
        points,
        tolerax.Accuracy(jnp.ones(3), jnp.ones(3)),
        mask=mask,
        derivatives=1,
        first_only=True,
    )
    answer: Any = first_differentiated(problem, query)
    np.testing.assert_allclose(answer.gradient[0], jax.grad(bowl)(points[0]), rtol=1e-12)
    assert np.isnan(np.asarray(answer.gradient[1:])).all()
    np.testing.assert_allclose(answer.value[1], bowl(points[1]), rtol=1e-12)
    np.testing.assert_allclose(answer.violation[:2], [2.0, 0.0])
    np.testing.assert_allclose(answer.jacobian.rmv(jnp.array(1.0)), [2.0, 1.0, 0.0])
    assert answer.work.as_dict() == {"points": 2, "values": 2, "gradients": 1}


def test_one_gradient_serves_a_ladder_of_values():
    solution = tolerax.solve(Objective(bowl), ALONE, jnp.zeros(3), max_steps=4)
    # Two gradients, two ladders of four directions at four lengths.
    assert solution.work.as_dict() == {"points": 34, "values": 34, "gradients": 2}
    assert float(solution.value) < float(bowl(jnp.zeros(3)))


def test_attacks_alone_minimize_what_is_smooth():
    solver = DirectionalAttack(then=(), gain=1e-9)
    solution = tolerax.solve(Objective(bowl, bounds=(-1.0, 1.0)), solver, jnp.ones(3))
    assert solution.status == Status.stalled
    np.testing.assert_allclose(solution.x, [0.5, -0.25, 0.1], atol=1e-3)


def test_a_zero_gradient_is_passed_on():
    """A plateau around the start, as of a saturated network: only values help."""

    def flat(x):
        slope = jnp.sum(jnp.maximum(jnp.abs(x - 0.6) - 0.05, 0.0))
        return jnp.where(jnp.max(jnp.abs(x)) < 0.1, 2.0, slope)

    problem = Objective(flat, bounds=(-1.0, 1.0))
    alone = tolerax.solve(problem, ALONE, jnp.zeros(2), max_steps=50)
    assert alone.status == Status.stalled
    assert float(alone.value) == 2.0
    solution = tolerax.solve(problem, DirectionalAttack(), jnp.zeros(2), max_steps=400)
    assert float(solution.value) <= 1e-6


def test_constraints_are_met_where_attacks_and_models_end():
    """The point of a disc nearest to (2, 1): at (2, 1) / sqrt(5)."""
    network = lambda x: jnp.stack([x[0] ** 2 + x[1] ** 2, x[0], x[1]])  # noqa: E731
    problem = NeuralSurrogate(
        network,
        lambda z, x: (z[1] - 2) ** 2 + (z[2] - 1) ** 2,
        constraints=lambda z, x: z[0] - 1.0,
        trust=(-3.0, 3.0),
    )
    solution = tolerax.solve(problem, DirectionalAttack(), jnp.array([-2.0, 2.0]), max_steps=600)
    assert float(solution.violation) <= 1e-6
    # The models are of a kinked sum, which is no success to claim; along the arc values are flat:
    # 0.05 beside the optimum the value is higher by 0.05^2 sqrt(5), 0.4 % of itself.
    assert solution.status == Status.stalled
    np.testing.assert_allclose(solution.x, np.array([2.0, 1.0]) / np.sqrt(5), atol=0.05)


def test_a_penalty_that_grows_is_no_progress():
    """Nothing here is feasible and the penalty grows with every gradient: the turns come to an end
    all the same."""
    problem = Objective(
        lambda x: jnp.sum(x**2), bounds=(-1.0, 1.0), constraints=lambda x: 2.0 + 0 * x[0]
    )
    solver = DirectionalAttack(then=(tolerax.ModelTrustRegion(),))
    solution = tolerax.solve(problem, solver, jnp.ones(2), max_steps=400)
    assert solution.status == Status.stalled
    assert float(solution.violation) == 2.0


def test_without_derivatives_gradients_are_estimated():
    problem = Objective(lambda x: float(bowl(x)), host=True)
    solution = tolerax.solve(
        problem, DirectionalAttack(then=(), samples=3), jnp.zeros(3), max_work={"points": 400}
    )
    assert float(solution.value) < 1e-2 * float(bowl(jnp.zeros(3)))
    assert int(solution.work.gradients) == 0
    with pytest.raises(TypeError, match="needs gradients"):
        tolerax.solve(problem, DirectionalAttack(then=()), jnp.zeros(3))


def test_bad_options_are_named():
    for options, match in [
        ({"gain": 0.0}, "gain is 0.0"),
        ({"samples": -1}, "samples is -1"),
        ({"memory": 0}, "memory is 0"),
    ]:
        with pytest.raises(ValueError, match=match):
            DirectionalAttack(**options)
    with pytest.raises(ValueError, match="must ask for values at batches"):
        tolerax.solve(
            Objective(bowl), DirectionalAttack(then=(tolerax.InexactLineSearch(),)), jnp.zeros(3)
        )
