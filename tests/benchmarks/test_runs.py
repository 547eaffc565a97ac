"""Recorded runs: what they cost, what is checked, and that a lie would be seen."""

import jax
import jax.numpy as jnp
import pytest

import tolerax
from benchmarks.certificates import check, probes
from benchmarks.runs import Loss, cost_of, first_below, record
from benchmarks.timing import compilations, import_seconds
from tolerax.problems.library import quadratic

READY = quadratic(1, n=60, d=4)


@pytest.fixture(scope="module")
def answers():
    return record(READY.problem, tolerax.InexactLineSearch(), READY.x0, 10_000)


def test_costs_are_lower_gradients_plus_products_and_grow(answers):
    assert cost_of(tolerax.Work(points=5, lower_gradients=2, hessian_products=3)) == 5
    costs = [told.cost for told in answers]
    assert costs == sorted(costs)
    assert costs[0] > 0
    stopped = record(READY.problem, tolerax.InexactLineSearch(), READY.x0, costs[1])
    assert [told.cost for told in stopped] == costs[:2]


def test_loss_is_the_true_upper_loss(answers):
    loss = Loss(READY.problem)
    for told in answers:
        # Lower-level gradients are solved to 1e-9 of the one at y = 0, and J is linear in y.
        assert loss(told.x) == pytest.approx(float(READY.value(told.x)), rel=1e-6)
    assert len(loss.known) == len({told.x.tobytes() for told in answers})


def test_certificates_hold_and_lies_are_seen(answers):
    answers = answers + probes(READY.problem, READY.x0, 0)[:3]
    assert not any(one.violated for one in check(answers, READY.problem))
    shifted = [
        told._replace(value=told.value + 2 * told.value_error + 1e-6 * abs(told.value))
        for told in answers
    ]
    assert all(one.violated for one in check(shifted, READY.problem))
    turned = [
        told._replace(gradient=told.gradient + 2 * told.gradient_error + 1e-6) for told in answers
    ]
    assert all(one.violated for one in check(turned, READY.problem))


def test_first_below_bisects_what_never_rises():
    values = [5.0, 4.0, 4.0, 2.0, 1.0]
    costs = [10, 20, 30, 40, 50]
    assert first_below(costs, values, lambda v: v, 4.0) == 20
    assert first_below(costs, values, lambda v: v, 1.5) == 50
    assert first_below(costs, values, lambda v: v, 0.5) is None
    assert first_below([], [], lambda v: v, 0.5) is None


def test_compilations_are_seen_and_calls_that_need_none_are_not():
    fun = jax.jit(lambda x: jnp.sin(x) + 1)
    three, four, other = jnp.ones(3), jnp.ones(4), jnp.zeros(3)
    fun(three)
    with compilations() as found:
        fun(other)
        assert len(found) == 0
        fun(four)
        assert len(found) == 1


def test_import_time_is_that_of_the_package():
    (seconds,) = import_seconds(1)
    assert 0.0 < seconds < 60.0
