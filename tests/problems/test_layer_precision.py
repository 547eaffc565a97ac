"""Layers in single precision, with bases that are nearly dependent, and without a ridge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from tolerax import Boxes, Equation, HardConstrained
from tolerax.problems import BackwardReport

G = 24
X = np.linspace(0.0, 1.0, G)
SLOPE = np.gradient(np.eye(G), X[1], axis=0, edge_order=2)

TOLERANCE = {"float32": 1e-6, "float64": 1e-10}


@functools.partial(jax.jit, static_argnames=("count", "dtype", "ridge"))
def run(mix, count, dtype, ridge=0.0):
    """u' + a u^2 = 0 in the span of x^k exp(-x), with x^2 replaced by mix x^3 + (1 - mix) x^2: the
    field, the derivative in the exponent, and the report on it."""
    x = jnp.asarray(X, dtype)
    equation = Equation(
        lambda u: jnp.stack([u, jnp.asarray(SLOPE, dtype) @ u]),
        lambda z, a: z[1] + a * z[0] ** 2,
        data=lambda a: a,
        lift=lambda a: jnp.ones(G, dtype),
    )

    def loss(rate, report):
        powers = [x**k for k in range(1, count + 1)]
        powers[1] = mix.astype(dtype) * powers[2] + (1 - mix.astype(dtype)) * powers[1]
        network = lambda a: jnp.stack(powers) * jnp.exp(-rate * x)[None]  # noqa: E731
        layer = HardConstrained(
            network, equation, Boxes((G,), (1,)), ridge=ridge, tolerance=TOLERANCE[dtype]
        )
        field = layer(jnp.array([4.0, 8.0], dtype), report=report)
        return jnp.sum(field.u**2 * x[None]), field

    one = jnp.ones((), dtype)
    (slope, report), field = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        one, BackwardReport.blank(2)
    )
    return field, slope, report


def test_single_precision_falls_back_where_normal_equations_have_lost_their_digits():
    none = jnp.zeros(())
    exact, slope, _ = run(none, 7, "float64")
    field, rough, report = run(none, 7, "float32")
    # J'J has a condition beyond 1 / eps of single precision, 8e6: no digit is left in it.
    condition = float(jnp.sqrt(exact.lanes.condition.min()))
    assert condition > 3e3
    assert np.all(field.lanes.condition > 8e6)
    assert field.u.dtype == jnp.float32
    # QR leaves eps * condition, times a constant of about 1.
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(field.u, exact.u, atol=eps * condition)
    failed = np.asarray(field.lanes.status == tolerax.PointStatus.failed)
    assert not np.any(failed | (report.failed > 0))
    # The derivative too; by eigenvectors of the Hessian it was 15 % off.
    np.testing.assert_allclose(rough, slope, rtol=20 * eps * condition)


def test_without_a_ridge_a_basis_that_has_lost_its_rank_says_so():
    exact, _, _ = run(jnp.zeros(()), 3, "float64")
    assert np.all(np.asarray(exact.lanes.status == tolerax.PointStatus.ok))
    field, found, report = run(jnp.ones(()), 3, "float64")
    assert np.all(np.isfinite(field.u))
    assert np.all(field.lanes.condition > 1e15)
    # Its field is the one in the span of what is left, x and x^3: worse, and no worse than that.
    assert np.all(jnp.mean(field.residual**2, axis=1) > jnp.mean(exact.residual**2, axis=1))
    near, left, _ = run(jnp.ones(()), 3, "float64", ridge=1e-12)
    gap = np.abs(field.u - near.u).max(axis=1)
    assert np.all(gap < 2e-3)
    # Where rounding ends a lane early, it does not claim to have converged.
    claimed = np.asarray(field.lanes.status == tolerax.PointStatus.ok)
    assert np.all(gap[claimed] < 1e-6)
    # Directions that are not determined have no part in the derivative.
    np.testing.assert_allclose(found, left, rtol=0.01, atol=1e-3)
    assert not np.any(report.failed)
