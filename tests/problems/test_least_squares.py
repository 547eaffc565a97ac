"""`LeastSquares`: value, gradient, residuals and operators, traced and in Python."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax import LeastSquares
from tolerax.contracts import Accuracy, Query

X = {"a": jnp.array([0.3, -0.7]), "b": jnp.array(1.5)}


def residuals(x):
    return {"p": x["b"] * jnp.sin(x["a"]), "q": jnp.stack([x["a"][0] * x["b"], x["b"] ** 2])}


def query(x=X, derivatives=2, mask=None):
    shape = () if mask is None else mask.shape
    return Query(
        x, Accuracy(jnp.zeros(shape), jnp.zeros(shape)), mask=mask, derivatives=derivatives
    )


def flat(x):
    return jax.flatten_util.ravel_pytree(x)[0]


def test_one_point():
    answer = LeastSquares(residuals).evaluate(query())
    r = flat(residuals(X))
    dense = np.concatenate(
        [
            np.reshape(leaf, (4, -1))
            for leaf in jax.tree.leaves(jax.jacrev(lambda x: flat(residuals(x)))(X))
        ],
        axis=1,
    )
    np.testing.assert_allclose(answer.residuals, r, rtol=1e-15)
    assert float(answer.value) == pytest.approx(float(r @ r) / 2, rel=1e-14)
    np.testing.assert_allclose(flat(answer.gradient), dense.T @ r, rtol=1e-13)
    v, w = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}, jnp.arange(4.0)
    np.testing.assert_allclose(answer.residuals_jacobian.mv(v), dense @ flat(v), rtol=1e-13)
    np.testing.assert_allclose(flat(answer.residuals_jacobian.rmv(w)), dense.T @ w, rtol=1e-13)
    value = lambda x: 0.5 * jnp.sum(flat(residuals(x)) ** 2)  # noqa: E731
    product = jax.jvp(jax.grad(value), (X,), (v,))[1]
    np.testing.assert_allclose(flat(answer.hessian.mv(v)), flat(product), rtol=1e-13)


def test_values_alone_come_with_residuals():
    answer = LeastSquares(residuals).evaluate(query(derivatives=0))
    assert answer.gradient is None
    assert answer.residuals_jacobian is None
    assert answer.residuals.shape == (4,)
    assert int(answer.work.values) == 1


@pytest.mark.parametrize("host", [False, True])
def test_a_batch_with_a_mask_and_a_failed_point(host):
    fun = lambda x: x / (x[0] > 0)  # noqa: E731
    if host:
        fun = lambda x: x if x[0] > 0 else x * np.nan  # noqa: E731
    x = jnp.array([[1.0, 2.0], [-1.0, 1.0], [3.0, 4.0]])
    problem = LeastSquares(fun, host=host, size=2)
    answer = problem.evaluate(query(x, 0, jnp.array([True, True, False])))
    assert int(answer.work.points) == 2
    np.testing.assert_allclose(answer.residuals[0], x[0])
    failed = answer.status == tolerax.PointStatus.failed
    assert failed[:2].tolist() == [False, True]


def test_python_residuals_on_a_pool():
    problem = LeastSquares(lambda x: [x[0], 2.0, float(x[1])], host=True, size=3)
    x = jnp.array([[1.0, 2.0], [5.0, 1.0]])
    with ThreadPoolExecutor(2) as pool:
        answer = problem.on(pool).evaluate(query(x, 0, jnp.ones(2, bool)))
    np.testing.assert_array_equal(answer.residuals, [[1, 2, 2], [5, 2, 1]])
    one = problem.evaluate(query(x[0], 0))
    assert float(one.value) == 4.5


def test_python_exceptions():
    def broken(x):
        raise RuntimeError("no")

    fails = LeastSquares(broken, host=True, size=1, on_error="fail").evaluate(query(X, 0))
    assert bool(fails.status == tolerax.PointStatus.failed)
    with pytest.raises(RuntimeError, match="no"):
        LeastSquares(broken, host=True, size=1).evaluate(query(X, 0))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="residuals"):
        LeastSquares(3)
    with pytest.raises(ValueError, match="size is None"):
        LeastSquares(residuals, host=True)
    with pytest.raises(ValueError, match="executor"):
        LeastSquares(residuals, executor=3)
    with pytest.raises(TypeError, match="needs gradients"):
        LeastSquares(lambda x: [1.0], host=True, size=1).evaluate(query(derivatives=1))
    with pytest.raises(TypeError, match="size is 2"):
        LeastSquares(lambda x: [1.0], host=True, size=2).evaluate(query(derivatives=0))
    with pytest.raises(TypeError, match="complex"):
        LeastSquares(lambda x: x["a"] * 1j).evaluate(query())
