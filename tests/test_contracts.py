"""The small parts of the contract: tolerances, work, provenance, exact evaluations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, PointStatus, Provenance, Query, Work
from tolerax.contracts import Problem, exact_evaluation, tree_all_finite
from tolerax.status import CONVERGED, Status, is_success


def test_accuracy():
    accuracy = Accuracy(1e-3, 1e-4)
    assert repr(accuracy * 0.5) == "Accuracy(state=5.0e-04, adjoint=5.0e-05)"
    assert float(accuracy.total) == pytest.approx(1.1e-3)
    assert float(Accuracy(jnp.inf, 1).state) == np.inf
    assert Accuracy(1, 2).adjoint.dtype == jnp.float64
    assert Accuracy(jnp.float32(1), 2.0).state.dtype == jnp.float32
    batch = Accuracy(jnp.ones(3), jnp.ones(3))
    assert "[1. 1. 1.]" in repr(batch)
    assert "Accuracy" in repr(jax.eval_shape(lambda: batch))


def test_changing_tolerances_does_not_compile_again():
    traced = []

    @jax.jit
    def use(accuracy):
        traced.append(repr(accuracy))
        return accuracy.total

    for tolerance in (1e-1, 1e-5):
        use(Accuracy(tolerance, 2 * tolerance))
    assert len(traced) == 1


def test_work_adds_up_by_kind():
    one = Work(points=1, values=1, lower_gradients=3, hessian_products=2)
    two = one + Work(points=1, linear_iterations=7)
    expected = {"points": 2, "values": 1, "lower_gradients": 3, "hessian_products": 2}
    assert two.as_dict() == expected | {"linear_iterations": 7}
    assert int(two.units) == 5
    # A point without work inside counts itself.
    assert int(Work(points=4, values=4, gradients=4).units) == 4
    assert int(Work(points=1, pde_solves=2, network_passes=3).units) == 5
    assert Work().as_dict() == {}
    stacked = jax.tree.map(lambda *counts: jnp.stack(counts), one, two)
    assert stacked.as_dict()["points"] == 3
    np.testing.assert_array_equal(stacked.units, [5, 5])


def test_provenance_is_certified_without_estimates():
    assert Provenance().certified
    assert str(Provenance()) == "exact"
    proved = Provenance((("strong_convexity", "proved"), ("cross", "given")))
    assert proved.certified
    assert str(proved) == "strong_convexity: proved, cross: given"
    assert not Provenance((*proved.constants, ("upper_smoothness", "estimated"))).certified


@pytest.mark.parametrize(
    ("value", "gradient", "ok"),
    [
        (1.0, 1.0, True),
        (-np.inf, 0.0, True),
        (np.inf, 1.0, False),
        (np.nan, 1.0, False),
        (1.0, np.nan, False),
        (1.0, -np.inf, False),
    ],
)
def test_exact_evaluations_mark_what_is_not_finite(value, gradient, ok):
    evaluation = exact_evaluation(jnp.array(value), {"a": jnp.array([1.0, gradient])}, Work())
    assert evaluation.status == (PointStatus.ok if ok else PointStatus.failed)
    assert float(evaluation.value_error) == float(evaluation.gradient_error) == 0
    assert evaluation.provenance.certified


def test_exact_evaluations_of_a_batch():
    values = jnp.array([1.0, jnp.nan, -jnp.inf])
    evaluation = exact_evaluation(values, None, Work(points=3))
    ok = np.asarray(evaluation.status == PointStatus.ok)
    np.testing.assert_array_equal(ok, [True, False, True])


def test_all_finite():
    assert tree_all_finite({})
    assert tree_all_finite({"a": jnp.ones(2), "b": jnp.zeros(0)})
    assert not tree_all_finite({"a": jnp.ones(2), "b": jnp.array([1.0, -jnp.inf])})


def test_queries_are_one_point_by_default():
    query = Query(jnp.ones(2), Accuracy(1, 1))
    assert (query.mask, query.carry, query.derivatives) == (None, None, 1)
    # What is asked for is part of the program, where is not.
    assert jax.tree.structure(query) != jax.tree.structure(
        Query(query.x, query.accuracy, None, None, 0)
    )


class Plain(Problem):
    bounds: Any = None

    def evaluate(self, query):
        return exact_evaluation(jnp.sum(query.x), query.x, Work(points=1))


def test_what_a_problem_has_by_default():
    problem = Plain()
    assert problem.cold_start() is None
    assert problem.provenance.certified
    assert not problem.host
    assert problem.outline() is problem
    with pytest.raises(ValueError, match="Plain is evaluated by compiled code"):
        problem.on(object())


def test_success_is_convergence_only():
    successful = [name for name in Status._name_to_item if is_success(getattr(Status, name))]
    assert successful == ["converged", "converged_estimated", "consensus", "sampled"]
    assert len(CONVERGED) == 4
    batch = jax.vmap(lambda ok: Status.where(ok, Status.converged, Status.budget))(
        jnp.array([True, False])
    )
    np.testing.assert_array_equal(is_success(batch), [True, False])


def test_public_names():
    for name in ("solve", "minimize", "scipy_method", "Objective", "Solver", "Status", "Work"):
        assert hasattr(tolerax, name)
