"""Plain functions as problems: compiled ones, and Python code called point by point."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import Accuracy, Objective, PointStatus, Query
from tolerax.problems.python_code import number
from tolerax.problems.task import task

X = {"a": jnp.array(2.0), "b": jnp.array([[1.0, -1.0]])}
ASK = Accuracy(0.1, 0.1)


def fun(x):
    return x["a"] ** 3 + jnp.sum(jnp.exp(x["b"]))


def python(x):
    return float(x["a"] ** 3 + np.exp(x["b"]).sum())


def gradient(x):
    return {"a": 3 * x["a"] ** 2, "b": np.exp(x["b"])}


def evaluate(problem, query) -> Any:
    return problem.evaluate(query)


def is_ok(evaluation):
    return np.asarray(evaluation.status == PointStatus.ok)


def batch_of(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


FORMS = {
    "differentiated": Objective(fun),
    "pair": Objective(lambda x: (fun(x), jax.grad(fun)(x)), gradient=True),
    "callable": Objective(fun, gradient=jax.grad(fun)),
    "python pair": Objective(lambda x: (python(x), gradient(x)), gradient=True, host=True),
    "python callable": Objective(python, gradient=gradient, host=True),
    "2-point": Objective(python, gradient="2-point", host=True),
    "3-point": Objective(python, gradient="3-point", host=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_of_points_and_batches(form):
    problem = FORMS[form]
    calls = {"2-point": 1 + 3 + 1, "3-point": 1 + 6 + 1}.get(form, 1)
    one = evaluate(problem, Query(X, ASK))
    np.testing.assert_allclose(one.value, python(jax.tree.map(np.asarray, X)), rtol=1e-14)
    expected = gradient(jax.tree.map(np.asarray, X))
    tolerance = max(float(one.gradient_error), 1e-13)
    for found, right in zip(jax.tree.leaves(one.gradient), jax.tree.leaves(expected), strict=True):
        assert found.shape == right.shape
        np.testing.assert_allclose(found, right, atol=tolerance)
    assert is_ok(one)
    assert one.work.as_dict() == {"points": calls, "values": calls, "gradients": 1}
    assert (float(one.gradient_error) == 0) == ("point" not in form)
    assert one.provenance.certified == ("point" not in form)
    assert problem.provenance.certified == ("point" not in form)

    other = jax.tree.map(lambda leaf: leaf + 0.5, X)
    mask = jnp.array([True, False, True])
    batch = evaluate(problem, Query(batch_of(X, X, other), ASK, mask=mask))
    assert batch.value.shape == batch.gradient_error.shape == (3,)
    assert batch.gradient["b"].shape == (3, 1, 2)
    np.testing.assert_allclose(batch.value[0], one.value, rtol=1e-14)
    last = evaluate(problem, Query(other, ASK))
    np.testing.assert_allclose(batch.value[2], last.value, rtol=1e-14)
    np.testing.assert_allclose(batch.gradient["a"][2], last.gradient["a"], rtol=1e-12)
    np.testing.assert_array_equal(is_ok(batch)[np.asarray(mask)], True)
    assert int(batch.work.points) == 2 * calls

    values = problem.evaluate(Query(X, ASK, derivatives=0))
    assert values.gradient is None
    assert values.work.as_dict() == {"points": 1, "values": 1}


@pytest.mark.parametrize("form", ["differentiated", "pair", "callable"])
def test_hessian_products(form):
    evaluation = FORMS[form].evaluate(Query(X, ASK, derivatives=2))
    v = jax.tree.map(lambda leaf: jnp.cos(leaf), X)
    product = evaluation.hessian.mv(v)
    np.testing.assert_allclose(product["a"], 6 * X["a"] * v["a"])
    np.testing.assert_allclose(product["b"], jnp.exp(X["b"]) * v["b"])


@pytest.mark.parametrize("form", ["python callable", "2-point", "python pair"])
def test_shapes_of_python_answers_are_known_without_calling(form):
    problem = FORMS[form]
    for query in (Query(X, ASK), Query(batch_of(X, X), ASK, mask=jnp.ones(2, bool))):
        shapes = jax.eval_shape(problem.evaluate, query)
        answer = problem.evaluate(query)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, answer)
        assert jax.tree.structure(shapes) == jax.tree.structure(answer)
        outlined = jax.eval_shape(problem.outline().evaluate, query)
        assert jax.tree.structure(outlined) == jax.tree.structure(answer)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("host", [False, True])
def test_points_without_a_value_are_failed(value, host):
    bad = lambda x: jnp.where(x[0] > 0, value, x[0]) if not host else value  # noqa: E731
    problem = Objective(bad, host=host, gradient=(lambda x: x) if host else None)
    evaluation = problem.evaluate(Query(jnp.ones(2), ASK))
    assert evaluation.status == PointStatus.failed
    assert float(evaluation.value_error) == 0


@pytest.mark.parametrize("host", [False, True])
def test_minus_infinity_is_a_value(host):
    problem = Objective(lambda x: -jnp.inf + 0 * x[0], gradient=lambda x: 0 * x, host=host)
    evaluation = problem.evaluate(Query(jnp.ones(2), ASK))
    assert is_ok(evaluation)
    assert float(evaluation.value) == -np.inf


def test_values_coarser_than_x_have_a_rounding_error():
    eps = float(np.finfo(np.float32).eps)
    narrow = lambda x: jnp.sum(x.astype(jnp.float32) ** 2)  # noqa: E731
    evaluation = Objective(narrow).evaluate(Query(jnp.ones(3), ASK))
    np.testing.assert_allclose(evaluation.value_error, 3 * eps, rtol=1e-6)
    python = Objective(lambda x: np.float32(3.0), gradient=lambda x: x, host=True)
    evaluation = python.evaluate(Query(jnp.ones(3), ASK))
    np.testing.assert_allclose(evaluation.value_error, 3 * eps, rtol=1e-6)
    exact = Objective(lambda x: jnp.sum(x**2)).evaluate(Query(jnp.ones(3, jnp.float32), ASK))
    assert float(exact.value_error) == 0
    assert exact.value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: None, "returned None"),
        (lambda x: 1j, "complex"),
        (lambda x: x, r"shape \(2,\)"),
        (lambda x: "1.0", "'1.0'.*a number"),
        (lambda x: np.timedelta64(1, "s"), "number"),
    ],
)
def test_wrong_answers_of_python_code(answer, message):
    problem = Objective(answer, gradient=lambda x: x, host=True)
    with pytest.raises(TypeError, match=message):
        problem.evaluate(Query(jnp.ones(2), ASK))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: 1j * x[0], "complex"),
        (lambda x: x, r"shape \(2,\)"),
        (lambda x: jnp.sum(x > 0), "int64, whose gradient is 0 everywhere"),
    ],
)
def test_wrong_answers_of_compiled_functions(answer, message):
    with pytest.raises(TypeError, match=message):
        Objective(answer).evaluate(Query(jnp.ones(2), ASK))


@pytest.mark.parametrize("host", [False, True])
def test_wrong_gradients_in_form(host):
    ask = Query(jnp.ones(2), ASK)
    value = (lambda x: float(x[0])) if host else (lambda x: x[0])
    for wrong, message in (
        (lambda x: x[:1], r"shape \(1,\) where x has \(2,\)"),
        (lambda x: {"a": x}, "structure"),
        (lambda x: 1j * x, "complex"),
    ):
        with pytest.raises(TypeError, match=message):
            Objective(value, gradient=wrong, host=host).evaluate(ask)


def test_numbers_of_many_kinds():
    for value in (3, 3.0, np.float64(3), np.array(3), np.array([[3.0]]), jnp.array(3.0), True + 2):
        assert number(value, np.float64) == (3.0, 0.0)


def test_python_code_gets_arrays_of_its_own():
    def spoils(x):
        value = float(np.sum(x**2))
        x[:] = 777.0
        return value

    for slope in (spoils, "2-point", "3-point"):
        kept = (lambda x: (spoils(x), 2 * np.ones(2))[1]) if callable(slope) else slope
        problem = Objective(spoils, gradient=kept, host=True)
        evaluation = evaluate(problem, Query(jnp.ones(2), ASK))
        assert float(evaluation.value) == 2.0
        np.testing.assert_allclose(evaluation.gradient, 2.0, atol=1e-6)


@pytest.mark.parametrize("executor", [None, "threads"])
def test_exceptions_raise_or_count_as_failed(executor, caplog):
    def breaks(x):
        if x[0] > 1:
            raise ArithmeticError("burst")
        return float(x[0])

    points = jnp.array([[0.0], [2.0], [1.0]])
    query = Query(points, ASK, mask=jnp.ones(3, bool), derivatives=0)
    with ThreadPoolExecutor(2) as pool:
        options = {"host": True, "executor": pool if executor else None}
        with pytest.raises(ArithmeticError, match="burst"):
            Objective(breaks, **options).evaluate(query)
        with caplog.at_level(logging.INFO, "tolerax"):
            evaluation = Objective(breaks, on_error="fail", **options).evaluate(query)
        assert "burst" in caplog.text
        np.testing.assert_array_equal(is_ok(evaluation), [True, False, True])
        np.testing.assert_array_equal(evaluation.value, [0.0, np.nan, 1.0])
        assert int(evaluation.work.points) == 3

        def stops(x):
            raise StopIteration

        with pytest.raises(StopIteration):
            Objective(stops, on_error="fail", **options).evaluate(query)


def test_an_executor_gets_single_points_too():
    seen = []

    class Recording(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            seen.append(fn)
            return super().submit(fn, *args, **kwargs)

    with Recording(1) as pool:
        problem = FORMS["python callable"].on(pool)
        one = problem.evaluate(Query(X, ASK))
    assert seen.count(task) == 1
    np.testing.assert_allclose(one.value, FORMS["python callable"].evaluate(Query(X, ASK)).value)


def test_a_gradient_that_is_missing_is_asked_for_before_the_first_call():
    calls = []
    problem = Objective(lambda x: calls.append(1), host=True)
    with pytest.raises(TypeError, match=r'give `gradient`.*"2-point"'):
        tolerax.solve(problem, tolerax.HOAG(), jnp.ones(2))
    assert not calls
    with pytest.raises(TypeError, match="needs gradients"):
        problem.evaluate(Query(jnp.ones(2), ASK, derivatives=2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient": "2-point"}, ValueError, "finite differences are for Python code"),
        ({"gradient": "cs", "host": True}, ValueError, "gradient is 'cs'"),
        ({"gradient": 3}, ValueError, "gradient is 3"),
        ({"on_error": "ignore"}, ValueError, 'on_error is \'ignore\': use "raise" or "fail"'),
        ({"executor": ThreadPoolExecutor}, ValueError, "evaluated by compiled code"),
        ({"executor": "3", "host": True}, TypeError, "must have `submit"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, error, message):
    # The annotations are checked first in tests, which is as good.
    with pytest.raises((error, TypeError)) as raised:
        Objective(fun, **arguments)
    assert re.search(f"{message}|violates type hint", str(raised.value))
    with pytest.raises(TypeError):
        Objective(3.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="evaluated by compiled code"):
        Objective(fun).on(ThreadPoolExecutor(1))


@pytest.mark.parametrize(
    "fun", [lambda x: np.sum(np.asarray(x) ** 2), lambda x: x[0] if x[0] > 0 else -x[0]]
)
def test_code_that_cannot_be_traced_is_told_of_host(fun):
    with pytest.raises(TypeError) as caught:
        tolerax.solve(Objective(fun), tolerax.CBO(particles=4), jnp.ones(2))
    assert any("host=True" in note for note in caught.value.__notes__)
