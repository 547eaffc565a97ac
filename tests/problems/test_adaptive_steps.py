"""Steps of controlled size, beside an equation that is solved in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from tolerax import Accuracy, AdaptiveSteps, PointStatus, Query, TimeDependent

STEADY = jnp.array([0.5, -1.0, 2.0])


def make():
    """`y' = -4 y + u` with u on three intervals of a third, and the integral of u^2 as a cost."""
    return TimeDependent(
        lambda t, y, u: -4 * y + u,
        lambda y, x: 0.5 * (y - 1) ** 2,
        jnp.array(1.0),
        running_cost=lambda t, y, u: y * u,
        controls=lambda x: x,
        metric=1 / 3,
        method=AdaptiveSteps(),
    )


def exact(x):
    """The cost: on an interval y goes from its start to u / 4 by the factor exp(-4 t)."""
    y, cost, h = 1.0, 0.0, 1 / 3
    damp = jnp.exp(-4 * h)
    for u in x:
        cost += u * (u / 4 * h + (y - u / 4) * (1 - damp) / 4)
        y = u / 4 + (y - u / 4) * damp
    return 0.5 * (y - 1) ** 2 + cost


def test_errors_are_below_their_bounds():
    problem = make()
    value, gradient = jax.value_and_grad(exact)(STEADY)
    evaluate = eqx.filter_jit(lambda p, x, accuracy, carry: p.evaluate(Query(x, accuracy, carry)))
    carry, spent = problem.cold_start(), []
    for tolerance in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        found = evaluate(problem, STEADY, Accuracy(tolerance, tolerance), carry)
        carry = found.carry
        assert abs(found.value - value) <= found.value_error
        assert problem.dual_norm(found.gradient - gradient) <= found.gradient_error
        assert found.achieved.state <= tolerance
        assert found.status == PointStatus.ok
        spent.append(int(found.work.lower_gradients))
    assert spent[0] < spent[-1]
    # The finest answer is right to what was asked, with bounds that say so.
    assert found.gradient_error < 1e-8
    assert not found.provenance.certified
    # What fails leaves the next warm start alone.
    lost = evaluate(problem, jnp.full(3, jnp.nan), Accuracy(1e-2, 1e-2), carry)
    assert lost.status == PointStatus.failed
    assert lost.carry == carry


def test_controls_without_intervals_are_named():
    with pytest.raises(ValueError, match=r"lengths \[0\]"):
        make().evaluate(Query(jnp.array(1.0), Accuracy(1.0, 1.0)))
