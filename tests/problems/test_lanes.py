"""Derivatives of minimizers in lanes: against closed forms, and lanes that fail."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax.inner.lane_adjoint import solve_hessian
from tolerax.inner.residuals import structured
from tolerax.problems import BackwardReport, InLanes

pytestmark = pytest.mark.accelerator

LANES, M, N = 4, 12, 3


def bent(w):
    return w + 0.1 * w**3


def residuals(w, data):
    """A (w + w^3 / 10) - b: the minimizer is known however A is conditioned."""
    A, b = data
    return A @ bent(w) - b


@functools.cache
def lanes(condition: float = 10.0):
    """Matrices, right-hand sides that they do not reach, minimizers and their derivative in b,
    from factors that are known."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(LANES, M, M)))[0]
    V = np.linalg.qr(rng.normal(size=(LANES, N, N)))[0]
    s = np.geomspace(1, 1 / condition, N)
    A = U[:, :, :N] * s @ np.swapaxes(V, 1, 2)
    w = rng.uniform(0.5, 1.5, (LANES, N))
    # Rounding A moves the minimizer by condition^2 * eps * |residual|: keep that below 1e-7.
    residual = min(0.3, 300 / condition)
    b = np.einsum("kmn,kn->km", A, bent(w)) + residual * U[:, :, N]
    pinv = (V / s) @ np.swapaxes(U[:, :, :N], 1, 2)
    return jnp.asarray(A), jnp.asarray(b), w, pinv / (1 + 0.3 * w**2)[:, :, None]


@functools.partial(jax.jit, static_argnames="hessian")
def gradient(A, b, start, ridge, hessian="exact"):
    """Of the sum of all minimizers in b, and the report; with the minimizers."""

    def loss(b, report):
        found = tolerax.batched_least_squares(
            residuals,
            start,
            (A, b),
            tolerance=1e-12,
            adjoint_tolerance=1e-9,
            ridge=ridge,
            bounds=(-5.0, 5.0),
            hessian=hessian,
            report=report,
        )
        return jnp.sum(found.w), found

    report = BackwardReport.blank(LANES)
    return jax.grad(loss, argnums=(0, 1), has_aux=True)(b, report)


START = jnp.ones((LANES, N))


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e5])
def test_the_exact_derivative_is_that_of_the_closed_form(condition):
    A, b, w, derivative = lanes(condition)
    (slope, report), found = gradient(A, b, START, 0.0)
    np.testing.assert_allclose(found.w, w, atol=condition * 1e-12 + 1e-9)
    true = derivative.sum(axis=1)
    # Rounding A turns its range, by eps * condition against its least direction, and with it the
    # part of the residual (0.003 at most) that H^-1, of size condition^2, is applied to.
    wrong = np.linalg.norm(slope - true) / np.linalg.norm(true)
    assert wrong <= 1e-11 + 0.1 * condition**2 * np.finfo(float).eps
    assert not np.any(report.failed)
    # Relative to terms of size |H| |q|, up to condition^2 times the right-hand side.
    assert np.all(report.residual <= 1e-14 * condition**2 + 1e-10)


@functools.cache
def derivatives(dtype, tolerance):
    """Of the sum of the minimizers in A and b, and the report."""

    def loss(A, b, report):
        start = jnp.ones((LANES, N), dtype)
        options = {"tolerance": tolerance, "report": report}
        return jnp.sum(tolerax.batched_least_squares(residuals, start, (A, b), **options).w)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize(
    ("dtype", "condition", "tolerance", "bound"),
    [("float64", 1e5, 1e-8, 1e-6), ("float32", 1e3, 1e-6, 100 * 1e3 * 6e-8)],
)
def test_a_minimizer_to_a_tolerance_has_the_derivative_of_one_nearby(
    dtype, condition, tolerance, bound
):
    """Errors of the tolerance and of rounding must not be divided by 1 / condition^2, the smallest
    eigenvalue: with residuals as they are the first derivative is wrong in its first digit."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        U = np.linalg.qr(rng.normal(size=(LANES, M, M)))[0]
        V = np.linalg.qr(rng.normal(size=(LANES, N, N)))[0]
        s = np.geomspace(1, 1 / condition, N)
        A = jnp.asarray(U[:, :, :N] * s @ np.swapaxes(V, 1, 2), dtype)
        # The factors of what it was rounded to: minimizers are those of b for the inverse of bent.
        U, s, V = np.linalg.svd(np.asarray(A, float), full_matrices=True)
        w = rng.uniform(0.5, 1.5, (LANES, N))
        beside = 1e-3 * U[:, :, N]
        b = jnp.asarray(np.einsum("kmn,kn->km", np.asarray(A, float), bent(w)) + beside, dtype)
        dA, db, report = derivatives(dtype, tolerance)(A, b, BackwardReport.blank(LANES))
        c = np.einsum("kij,kj->ki", V, 1 / (1 + 0.3 * w**2)) / s
        in_b = np.einsum("kmi,ki->km", U[:, :, :N], c)
        through = np.einsum("kij,ki->kj", V, c / s)
        in_A = beside[:, :, None] * through[:, None] - in_b[:, :, None] * bent(w)[:, None]
        assert not np.any(report.failed)
        for found, true in ((dA, in_A), (db, in_b)):
            assert np.linalg.norm(found - true) <= bound * np.linalg.norm(true)


def test_gauss_newton_is_wrong_where_residuals_are_large_and_says_so():
    A, b, _, derivative = lanes()
    true = derivative.sum(axis=1)
    (exact, _), _ = gradient(A, b, START, 0.0)
    (by_cg, report), _ = gradient(A, b, START, 0.0, "cg")
    np.testing.assert_allclose(by_cg, exact, atol=1e-7)
    assert np.all(report.products > 0)
    # Residuals that are orthogonal to the range of A have no curvature: bend them.
    shifted = b + 0.3 * A @ jnp.ones(N)
    (exact, fine), _ = gradient(A, shifted, 1.5 * START, 0.5)
    (rough, report), _ = gradient(A, shifted, 1.5 * START, 0.5, "gauss-newton")
    wrong = np.linalg.norm(exact - rough)
    assert wrong > 1e-3 * np.linalg.norm(true)
    assert np.all(report.residual > 1e3 * fine.residual)


def test_a_ridge_is_the_same_forward_and_backward():
    A, b, _, _ = lanes()
    A = A.at[0, :, 1].set(A[0, :, 0])  # a basis that has lost its rank
    (slope, report), _ = gradient(A, b, START, 1e-2)
    assert not np.any(report.failed)
    step = 1e-5 * jnp.cos(jnp.arange(LANES * M)).reshape(b.shape)
    ends = [float(jnp.sum(gradient(A, b + side * step, START, 1e-2)[1].w)) for side in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float(jnp.vdot(slope, step)), rel=1e-5)


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton", "cg"])
def test_lanes_that_fail_have_no_gradient_and_say_so(hessian):
    A, b, _, _ = lanes()
    (clean, _), _ = gradient(A, b, START, 0.0, hessian)
    (slope, report), found = gradient(A, b.at[2, 0].set(jnp.nan), START, 0.0, hessian)
    assert report.failed.tolist() == [0, 0, 1, 0]
    assert np.all(np.asarray(slope)[2] == 0)
    others = [0, 1, 3]
    np.testing.assert_allclose(slope[np.array(others)], clean[np.array(others)], rtol=1e-9)
    failed = np.asarray(found.status == tolerax.PointStatus.failed)
    assert failed.tolist() == [False, False, True, False]
    # Without a ridge a coefficient with a column of zeros is not determined: no derivative, and no
    # number in its place.
    A = A.at[0, :, 1].set(0.0)
    (slope, report), _ = gradient(A, b, START, 0.0, hessian)
    assert report.failed.tolist() == [1, 0, 0, 0]
    assert np.all(np.asarray(slope)[0] == 0)


def test_conjugate_gradients_that_end_too_early_fail():
    data, free = lanes()[:2], jnp.ones((LANES, N), bool)
    options = {"ridge": jnp.zeros(LANES), "free": free, "hessian": "cg", "max_products": 1}
    solve = solve_hessian(structured(residuals), START, data, START, **options)
    assert np.all(solve.failed)
    assert np.all(np.asarray(solve.x) == 0)


def test_variables_at_a_bound_do_not_move():
    A = lanes(1.0)[0]  # orthonormal columns: every variable has its own minimum
    high = 8.0 * A @ jnp.ones(N) * jnp.arange(1.0, LANES + 1)[:, None]
    (slope, report), found = gradient(A, high, START, 0.0)
    held = np.all(np.asarray(found.w) == 5.0, axis=1)
    assert held.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(np.asarray(slope)[held], 0.0)
    assert not np.any(report.failed)


def test_a_guess_saves_evaluations_and_changes_no_derivative():
    A, b, _, _ = lanes()
    (cold, _), found = gradient(A, b, START, 0.0)
    (warm, _), again = gradient(A, b, found.w, 0.0)
    assert np.all(again.evaluations == 1)
    assert np.all(found.evaluations > 3)
    np.testing.assert_allclose(warm, cold, rtol=1e-9)


def test_bad_input_is_named():
    with pytest.raises(Exception, match="hessian"):
        InLanes(residuals, hessian="newton")
    A, b, _, _ = lanes()
    fit = functools.partial(tolerax.batched_least_squares, residuals, START, (A, b))
    with pytest.raises(ValueError, match="ridge is -1"):
        fit(ridge=-1.0)
    with pytest.raises(ValueError, match="lower bounds must not be above"):
        fit(bounds=(3.0, -3.0))
    with pytest.raises(ValueError, match=r"give BackwardReport.blank\(4\)"):
        fit(report=BackwardReport.blank(3))
    with pytest.raises(ValueError, match="ridge is differentiated"):
        jax.grad(lambda ridge: jnp.sum(fit(ridge=ridge).w))(0.1)

    def closed_over(scale):
        rows = lambda w, data: scale * residuals(w, data)  # noqa: E731
        return jnp.sum(tolerax.batched_least_squares(rows, START, (A, b)).w)

    with pytest.raises(ValueError, match="scale in residuals is differentiated"):
        jax.grad(closed_over)(2.0)


def test_data_need_not_be_floats():
    A, b, _, _ = lanes()
    (clean, _), _ = gradient(A, b, START, 0.0)
    # Neither the order of residuals nor their signs change anything.
    order = jnp.broadcast_to(jnp.arange(M)[::-1], (LANES, M))
    turned = jnp.broadcast_to(jnp.arange(M) % 2 == 0, (LANES, M))

    def signed(w, data):
        return jnp.where(data[3], -1, 1) * residuals(w, data[:2])[data[2]]

    def loss(b):
        data = (A, b, order, turned)
        return jnp.sum(tolerax.batched_least_squares(signed, START, data).w)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(b), clean, rtol=1e-6, atol=1e-8)


DEVICES = """
import equinox, jax, numpy, sys
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import tolerax
from tests.problems.test_hard_constrained import BENT, BOXES, EQUATION, NETWORK
from tests.problems.test_lanes import START, lanes, residuals

A, b, _, _ = lanes()
rows = []
for count in (1, 8):
    mesh = Mesh(numpy.array(jax.devices()[:count]), ("experts",))
    sharding = None if count == 1 else NamedSharding(mesh, PartitionSpec("experts"))
    solver = tolerax.BatchedLevenbergMarquardt(sharding=sharding)

    @jax.jit
    def minimizers(b):
        found = tolerax.batched_least_squares(residuals, START, (A, b), solver=solver, ridge=0.1)
        return jax.numpy.sum(found.w), found

    (_, found), slope = jax.value_and_grad(minimizers, has_aux=True)(b)
    layer = tolerax.HardConstrained(NETWORK, EQUATION, BOXES, ridge=1e-4, solver=solver)
    field = equinox.filter_jit(layer)(BENT)
    for spread in (found.w, slope, field.u):
        assert len(spread.sharding.device_set) == count, spread.sharding
    rows.append(numpy.concatenate([found.w.ravel(), slope.ravel(), field.u.ravel()]))
numpy.save(sys.argv[1], rows)
"""


def test_one_device_gives_what_eight_give(tmp_path):
    """Four lanes on eight devices: half of them have none of their own. And a layer of 3 experts
    for each of 2 samples."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path / "rows.npy")],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    one, eight = np.load(tmp_path / "rows.npy")
    np.testing.assert_allclose(eight, one, rtol=1e-12, atol=1e-12)
