"""Least squares in lanes: against SciPy, with bounds, bad lanes and bad conditions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import tolerax
from tolerax import PointStatus
from tolerax.inner import Pointwise

pytestmark = pytest.mark.accelerator

LANES, M, N = 5, 40, 3


def model(z, data):
    """Channels u, u' of a nonlinear equation."""
    return z[1] + z[0] * jnp.abs(z[0]) ** 0.7 - data


def lanes(noise=0.0, seed=0, condition=1.0):
    """Data (Phi, f) of all lanes, and starts near the coefficients that made them."""
    rng = np.random.default_rng(seed)
    Phi = rng.normal(size=(LANES, 2, M, N)) * np.geomspace(1, 1 / condition, N)
    w = rng.uniform(0.5, 1.5, (LANES, N))
    f = model(np.moveaxis(np.einsum("kcmn,kn->kcm", Phi, w), 1, 0), 0.0)
    f = np.asarray(f) + noise * rng.normal(size=(LANES, M))
    return (jnp.asarray(Phi), jnp.asarray(f)), jnp.asarray(w + 0.1 * rng.normal(size=w.shape))


def solve(solver, residuals, w, data, *, tolerance=1e-8, ridge=0.0, bounds=(-np.inf, np.inf)):
    """With all numbers as arrays, so that one compilation serves all of them."""
    full = lambda value: jnp.full(w.shape, value, w.dtype)  # noqa: E731
    numbers = {"tolerance": full(tolerance)[:, 0], "ridge": full(ridge)[:, 0]}
    return compiled(solver, residuals, w, data, bounds=tuple(map(full, bounds)), **numbers)


@eqx.filter_jit
def compiled(solver, residuals, w, data, **options):
    return solver(residuals, w, data, **options)


def names(result):
    kinds = list(PointStatus._name_to_item)
    values = [int(getattr(PointStatus, kind)._value) for kind in kinds]
    return [kinds[values.index(int(v))] for v in result.status._value]


SOLVER = tolerax.BatchedLevenbergMarquardt()
TOGETHER = tolerax.BatchedLevenbergMarquardt(block=LANES)
RESIDUALS = Pointwise(model)


def by_scipy(w, data, ridge=0.0, bounds=(-np.inf, np.inf)):
    """Every lane alone, by trust-region reflective with its own finite differences."""
    found = []
    for k in range(len(w)):
        Phi, f = np.asarray(data[0][k]), np.asarray(data[1][k])

        def fun(w, Phi=Phi, f=f):
            rows = np.asarray(model(np.einsum("cmn,n->cm", Phi, w), f))
            return np.concatenate([rows, np.sqrt(ridge) * w])

        start = np.clip(np.asarray(w[k]), np.add(bounds[0], 1e-9), np.subtract(bounds[1], 1e-9))
        tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
        found.append(scipy.optimize.least_squares(fun, start, bounds=bounds, **tight).x)
    return np.array(found)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_agrees_with_scipy_lane_by_lane(noise):
    data, w = lanes(noise)
    result = solve(SOLVER, RESIDUALS, w, data, tolerance=1e-9, ridge=1e-3)
    assert names(result) == ["ok"] * LANES
    # SciPy's differences leave 1e-7 or so of the gradient.
    np.testing.assert_allclose(result.w, by_scipy(w, data, ridge=1e-3), atol=1e-6)
    assert np.all(result.error <= 1e-9)
    assert np.all(result.evaluations < 15)


def test_bounds_hold_and_are_where_scipy_finds_the_minimum():
    data, w = lanes(0.1)
    result = solve(SOLVER, RESIDUALS, w, data, tolerance=1e-9, bounds=(0.8, 1.1))
    assert names(result) == ["ok"] * LANES
    assert np.all((result.w >= 0.8) & (result.w <= 1.1))
    assert np.sum((result.w == 0.8) | (result.w == 1.1)) > 3
    np.testing.assert_allclose(result.w, by_scipy(w, data, bounds=(0.8, 1.1)), atol=1e-6)


def test_blocks_and_structure_change_nothing_but_rounding():
    data, w = lanes(0.5)
    plain = lambda w, data: model(jnp.einsum("cmn,n->cm", data[0], w), data[1])  # noqa: E731
    one = solve(SOLVER, RESIDUALS, w, data)
    for solver, residuals in [
        (TOGETHER, RESIDUALS),
        (tolerax.BatchedLevenbergMarquardt(block=2), plain),
    ]:
        other = solve(solver, residuals, w, data)
        np.testing.assert_allclose(other.w, one.w, rtol=1e-7)
        np.testing.assert_array_equal(other.evaluations, one.evaluations)


def test_a_structured_jacobian_and_curvature_are_those_of_jax():
    data, w = lanes()
    one = (data[0][0], data[1][0])

    @jax.jit
    def both(w):
        r, J = RESIDUALS.with_jacobian(w, one)
        dense = jax.hessian(lambda w: jnp.vdot(r, RESIDUALS(w, one)))(w)
        fun = lambda w: RESIDUALS(w, one)  # noqa: E731
        return (J, RESIDUALS.curvature(w, one, r)), (jax.jacrev(fun)(w), dense)

    for ours, dense in zip(*both(w[0]), strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-10, atol=1e-12)


def test_a_bad_lane_fails_alone():
    data, w = lanes()
    bad = (data[0], data[1].at[1].set(jnp.nan))
    clean = solve(SOLVER, RESIDUALS, w, data)
    w = w.at[3, 0].set(jnp.inf)
    for solver in (SOLVER, TOGETHER):
        result = solve(solver, RESIDUALS, w, bad)
        assert names(result) == ["ok", "failed", "ok", "failed", "ok"]
        for k in (0, 2, 4):
            np.testing.assert_allclose(result.w[k], clean.w[k], rtol=1e-9)
        np.testing.assert_array_equal(result.w[1], w[1])


def test_numbers_that_make_no_sense_fail_in_compiled_code_too():
    data, w = lanes()
    assert names(solve(SOLVER, RESIDUALS, w, data, ridge=-1.0)) == ["failed"] * LANES
    assert names(solve(SOLVER, RESIDUALS, w, data, bounds=(3.0, -3.0))) == ["failed"] * LANES


def test_ridge_decides_where_the_data_do_not():
    """Two equal columns: without a ridge any split is a minimum, and one is found; with a ridge
    both get the same."""
    t = jnp.linspace(0.0, 1.0, 9)[None]
    equal = lambda w, t: (w[0] + w[1]) * t - 2 * t  # noqa: E731
    w = jnp.array([[3.0, 0.0]])
    free = solve(SOLVER, equal, w, t)
    assert names(free) == ["ok"]
    assert float(jnp.sum(free.w)) == pytest.approx(2, abs=1e-8)
    assert float(free.condition[0]) > 1e13
    held = solve(SOLVER, equal, w, t, ridge=1e-6)
    assert names(held) == ["ok"]
    np.testing.assert_allclose(held.w[0], [1.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9])
def test_linear_problems_are_solved_as_well_as_by_a_dense_solver(condition):
    """Columns of length 1 and neighbours that are nearly parallel: scaling cannot help. From a
    condition of about 1e7 of J the normal equations have no digits left, and QR takes over."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(30, 4)))[0]
    V = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    A = U * np.geomspace(1, 1 / condition, 4) @ V.T
    b = A @ np.array([1.0, -1.0, 2.0, 0.5])
    line = lambda w, data: data[0] @ w - data[1]  # noqa: E731
    data = (jnp.asarray(A)[None], jnp.asarray(b)[None])
    result = solve(SOLVER, line, jnp.zeros((1, 4)), data, tolerance=1e-13)
    assert names(result)[0] in ("ok", "floor")
    # The tolerance is on |A e|; the rest is what rounding the data alone does.
    error = np.linalg.norm(result.w[0] - np.array([1.0, -1.0, 2.0, 0.5]))
    assert error <= condition * (1e-13 + 50 * np.finfo(float).eps)
    assert np.linalg.norm(A @ result.w[0] - b) <= 1e-13


def test_float32_says_what_it_cannot_resolve():
    data, w = lanes()
    data, w = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (data, w))
    result = solve(SOLVER, RESIDUALS, w, data, tolerance=1e-12)
    assert result.w.dtype == jnp.float32
    assert set(names(result)) <= {"floor", "ok"}
    assert "floor" in names(result)
    exact = solve(SOLVER, RESIDUALS, *jax.tree.map(lambda leaf: leaf.astype(float), (w, data)))
    np.testing.assert_allclose(result.w, exact.w, rtol=1e-4)


def test_data_that_the_model_cannot_explain_take_second_derivatives():
    """Residuals of Gauss-Newton's nightmare: r = (w + 1, c w^2 + w - 1) with c = -2 has its
    minimum where the curvature left out outweighs J'J (Dennis and Schnabel, 1983, table 10.2.4)."""
    hard = lambda w, c: jnp.stack([w[0] + 1, c * w[0] ** 2 + w[0] - 1])  # noqa: E731
    w, c = jnp.full((3, 1), 0.4), jnp.array([0.5, -0.9, -2.0])
    result = solve(SOLVER, hard, w, c)
    assert names(result) == ["ok"] * 3
    for k in range(3):
        value = lambda w, k=k: 0.5 * jnp.sum(hard(w, c[k]) ** 2)  # noqa: E731
        assert abs(float(jax.grad(value)(result.w[k])[0])) < 1e-7
        assert float(jax.hessian(value)(result.w[k])[0, 0]) > 0
    assert np.all(result.evaluations < 20)


def test_bad_input_is_named():
    data, w = lanes()
    with pytest.raises(ValueError, match="block is 0"):
        tolerax.BatchedLevenbergMarquardt(block=0)
    with pytest.raises(ValueError, match="max_steps is 0"):
        tolerax.BatchedLevenbergMarquardt(max_steps=0)
    with pytest.raises(ValueError, match="ridge is -1"):
        SOLVER(RESIDUALS, w, data, ridge=-1.0)
    with pytest.raises(ValueError, match=r"residuals returned shape \(3, 3\)"):
        SOLVER(lambda w, _: jnp.outer(w, w), w)
    with pytest.raises(TypeError, match="residuals returned float64 for w in float32"):
        SOLVER(lambda w, _: w * np.ones(N), w.astype("float32"))
    with pytest.raises(ValueError, match="leading axis of lanes"):
        SOLVER(RESIDUALS, w, jax.tree.map(lambda leaf: leaf[0], data))
    with pytest.raises(Exception, match="w"):
        SOLVER(RESIDUALS, w[0], data)
    with pytest.raises(TypeError, match="residuals is 3"):
        SOLVER(3, w, data)
    with pytest.raises(ValueError, match="one for each of the 40 points"):
        SOLVER(Pointwise(lambda z, f: z[0][:3]), w, data)
