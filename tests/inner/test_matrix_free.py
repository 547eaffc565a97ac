"""Least squares in lanes by products: beside the solver that factors, and against dense algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.inner.test_levenberg_marquardt import LANES, RESIDUALS, SOLVER, lanes, names, solve
from tolerax.inner import GaussNewtonCG
from tolerax.inner.lanes import PATIENCE
from tolerax.inner.matrix_free import squared_lengths

pytestmark = pytest.mark.accelerator

MATRIX_FREE = GaussNewtonCG()


def line(w, data):
    return data[0] @ w - data[1]


def bent(w, data):
    return data[0] @ (w + 0.01 * w**3) - data[1]


def distance(residuals, w, data, ridge):
    """The distance to the minimizer in the energy norm up to second order, by dense algebra."""
    J, r = jax.jacrev(residuals)(w, data), residuals(w, data)
    rows = np.concatenate([J, np.sqrt(ridge) * np.eye(w.size)])
    whole = np.concatenate([r, np.sqrt(ridge) * w])
    return np.linalg.norm(rows @ np.linalg.lstsq(rows, whole)[0])


@pytest.mark.parametrize(
    ("noise", "options"),
    [
        (0.0, {}),
        (0.5, {"ridge": 1e-3}),
        (0.5, {"ridge": 0.0}),
        (0.1, {"bounds": (0.8, 1.1)}),
    ],
)
def test_finds_what_factoring_finds(noise, options):
    data, w = lanes(noise)
    factored = solve(SOLVER, RESIDUALS, w, data, tolerance=1e-9, **options)
    result = solve(MATRIX_FREE, RESIDUALS, w, data, tolerance=1e-9, **options)
    assert names(result) == ["ok"] * LANES
    # Both are within 1e-9 in the energy norm; the smallest singular value of J is above 0.1.
    np.testing.assert_allclose(result.w, factored.w, atol=2e-8)
    assert np.all(result.evaluations <= factored.evaluations + 4)
    assert np.all(np.asarray(result.products) > 0)


def test_blocks_and_batches_change_nothing_but_rounding():
    data, w = lanes(0.5)
    one = solve(MATRIX_FREE, RESIDUALS, w, data)
    together = solve(GaussNewtonCG(block=LANES), RESIDUALS, w, data)
    plain = lambda w, data: RESIDUALS(w, data)  # noqa: E731
    two = solve(GaussNewtonCG(block=2), plain, w, data)
    nested = jax.jit(jax.vmap(lambda w, data: MATRIX_FREE(RESIDUALS, w[None], data)))
    apart = nested(w, jax.tree.map(lambda leaf: leaf[:, None], data))
    for other in (together.w, two.w, apart.w[:, 0]):
        # Where rounding turns a stopping test, an answer within the tolerance of 1e-8 is another.
        np.testing.assert_allclose(other, one.w, atol=1e-7)


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_linear_problems_are_solved_as_by_a_dense_solver(condition):
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(size, 20)))[0] for size in (50, 20))
    A = U * np.geomspace(1, 1 / condition, 20) @ V.T
    # Columns of very different lengths are no matter.
    A = A * np.geomspace(1, 1e4, 20)
    b = A @ rng.normal(size=20) + 0.1 * rng.normal(size=50)
    data = (jnp.asarray(A)[None], jnp.asarray(b)[None])
    result = solve(MATRIX_FREE, line, jnp.zeros((1, 20)), data, tolerance=1e-8)
    assert names(result) == ["ok"]
    left = A @ (np.asarray(result.w[0]) - np.linalg.lstsq(A, b)[0])
    # Without a ridge the error is an estimate: twice as much would be one that is no use.
    assert np.linalg.norm(left) <= 2e-8


@functools.cache
def random_problem(seed, noise=0.1):
    """40 unknowns, and singular values over three decades."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(size, 40)))[0] for size in (60, 40))
    A = U * np.geomspace(1, 1e-3, 40) @ V.T
    b = A @ rng.uniform(-1, 1, 40) + noise * rng.normal(size=60)
    return jnp.asarray(A), jnp.asarray(b)


@pytest.mark.parametrize(("residuals", "noise"), [(line, 0.1), (bent, 1e-4)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_with_a_ridge_the_error_is_a_bound(residuals, noise, ridge):
    """At loose tolerances and out of products, where the tail of conjugate gradients is large. With
    second derivatives, which slow lanes take, it is an estimate."""
    problems = [random_problem(seed, noise) for seed in range(6)]
    data = tuple(jnp.stack(leaf) for leaf in zip(*problems, strict=True))
    w = jnp.zeros((6, 40))
    ratios = []
    for tolerance, most in ((1e-1, 10_000), (1e-3, 10_000), (1e-6, 10_000), (1e-9, 12)):
        solver = GaussNewtonCG(max_products=most)
        result = solve(solver, residuals, w, data, tolerance=tolerance, ridge=ridge)
        assert set(names(result)) == ({"inaccurate"} if most == 12 else {"ok"})
        for k in range(6):
            if result.evaluations[k] > PATIENCE:
                continue
            true = distance(residuals, result.w[k], problems[k], ridge)
            # Rounding of J'r, 1e-16, is divided by the root of the ridge at most.
            assert true <= result.error[k] * (1 + 1e-6) + 1e-15 / np.sqrt(ridge)
            ratios.append(float(result.error[k]) / true)
    # Not slow are all on straight residuals, and most on curved ones.
    assert len(ratios) >= (24 if residuals is line else 16)
    # With a ridge that is not small beside the spectrum it says something, too.
    assert np.median(ratios) < (3 if ridge == 1e-2 else 100)


def test_ridge_decides_where_the_data_do_not():
    t = jnp.linspace(0.0, 1.0, 9)[None]
    equal = lambda w, t: (w[0] + w[1]) * t - 2 * t  # noqa: E731
    w = jnp.array([[3.0, 0.0]])
    free = solve(MATRIX_FREE, equal, w, t)
    assert names(free) == ["ok"]
    assert float(jnp.sum(free.w)) == pytest.approx(2, abs=1e-8)
    held = solve(MATRIX_FREE, equal, w, t, ridge=1e-6, tolerance=1e-10)
    assert names(held) == ["ok"]
    # The difference of both has the energy ridge / 2 times its square.
    np.testing.assert_allclose(held.w[0], [1.0, 1.0], atol=2e-6)
    # Columns of length 1 that are the same: eigenvalues 2 and ridge / |t|^2.
    exact = 2 * float(t[0] @ t[0]) / 1e-6
    assert 0.3 * exact <= float(held.condition[0]) <= 1.01 * exact


def test_a_bad_lane_fails_alone():
    data, w = lanes()
    bad = (data[0], data[1].at[1].set(jnp.nan))
    clean = solve(MATRIX_FREE, RESIDUALS, w, data)
    w = w.at[3, 0].set(jnp.inf)
    for solver in (MATRIX_FREE, GaussNewtonCG(block=LANES)):
        result = solve(solver, RESIDUALS, w, bad)
        assert names(result) == ["ok", "failed", "ok", "failed", "ok"]
        np.testing.assert_allclose(result.w[::2], clean.w[::2], atol=1e-7)
        np.testing.assert_array_equal(result.w[1], w[1])
    assert names(solve(MATRIX_FREE, RESIDUALS, w, data, ridge=-1.0)) == ["failed"] * LANES
    assert names(solve(MATRIX_FREE, RESIDUALS, w, data, bounds=(3.0, -3.0))) == ["failed"] * LANES


def test_steps_into_what_is_not_finite_are_cut():
    """The first step goes to w = -3, where the root is not a number."""
    root = lambda w, c: jnp.sqrt(w) - c  # noqa: E731
    result = solve(MATRIX_FREE, root, jnp.array([[9.0]]), jnp.array([1.0]))
    assert names(result) == ["ok"]
    assert float(result.w[0, 0]) == pytest.approx(1, abs=1e-7)


def test_data_that_the_model_cannot_explain_take_second_derivatives():
    """For c = -2 the curvature that Gauss and Newton leave out outweighs J'J (Dennis and Schnabel,
    1983, table 10.2.4): their steps do not converge."""
    hard = lambda w, c: jnp.stack([w[0] + 1, c * w[0] ** 2 + w[0] - 1])  # noqa: E731
    w, c = jnp.full((3, 1), 0.4), jnp.array([0.5, -0.9, -2.0])
    result = solve(MATRIX_FREE, hard, w, c)
    assert names(result) == ["ok"] * 3
    assert np.all(result.evaluations < 20)
    for k in range(3):
        value = lambda w, k=k: 0.5 * jnp.sum(hard(w, c[k]) ** 2)  # noqa: E731
        assert abs(float(jax.grad(value)(result.w[k])[0])) < 1e-7
        assert float(jax.hessian(value)(result.w[k])[0, 0]) > 0


def test_out_of_products_the_last_step_is_taken():
    A, b = random_problem(7)
    data = (A[None], b[None])
    short = solve(GaussNewtonCG(max_products=5), line, jnp.zeros((1, 40)), data, ridge=1e-3)
    assert names(short) == ["inaccurate"]
    assert int(short.products[0]) == 5
    assert float(short.cost[0]) < 0.5 * float(b @ b) / 2
    assert float(short.error[0]) >= distance(line, short.w[0], (A, b), 1e-3)


def test_float32_says_what_it_cannot_resolve():
    data, w = lanes()
    data, w = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (data, w))
    result = solve(MATRIX_FREE, RESIDUALS, w, data, tolerance=1e-12)
    assert result.w.dtype == jnp.float32
    assert set(names(result)) <= {"floor", "ok"}
    assert "floor" in names(result)
    assert np.all(result.evaluations < 40)
    exact = solve(SOLVER, RESIDUALS, *jax.tree.map(lambda leaf: leaf.astype(float), (w, data)))
    np.testing.assert_allclose(result.w, exact.w, rtol=1e-4)


N, M, SPACING = 5000, 8000, 0.01


def oscillator(u, data):
    """`u' + u + u^3 / 3 = f` by differences, the start, and values at 3000 points."""
    f, seen = data
    equation = u[1:] - u[:-1] + SPACING * (u[1:] + u[1:] ** 3 / 3 - f[1:])
    return jnp.concatenate([u[:1], equation, 0.01 * (u[: M - N] - seen)])


def test_large_problems_never_see_a_square_matrix():
    t = SPACING * jnp.arange(N)
    f, seen = jnp.stack([jnp.sin(t), 1 + jnp.cos(t)]), jnp.full((2, M - N), 0.3)
    start = jnp.zeros((2, N))

    def minimizers(f):
        return tolerax.batched_least_squares(
            oscillator,
            start,
            (f, seen),
            tolerance=1e-8,
            adjoint_tolerance=1e-8,
            solver=MATRIX_FREE,
            hessian="cg",
            max_products=5000,
        )

    def loss(f):
        found = minimizers(f)
        return jnp.sum(found.w[:, -1]), found

    both = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(f).compile()
    # A twentieth of what J'J alone would take, and the data are an eightieth.
    assert both.memory_analysis().temp_size_in_bytes < 0.05 * N * N * 8
    (_, found), slope = both(f)
    assert names(found) == ["ok", "ok"]
    gradient = jax.vmap(jax.grad(lambda u, d: 0.5 * jnp.sum(oscillator(u, d) ** 2)))
    assert np.max(np.abs(gradient(found.w, (f, seen)))) < 1e-8
    # Forces act at once, and are forgotten.
    way = 1e-3 * jnp.exp(-0.5 * ((t - 49.0) / 0.3) ** 2)
    up, down = (both(f + sign * way[None])[0][0] for sign in (1, -1))
    assert float(up - down) / 2 == pytest.approx(float(jnp.sum(slope * way[None])), rel=1e-4)


def test_its_minimizers_have_the_derivatives_of_the_dense_solver():
    data, w = lanes(0.5)

    def loss(f, **options):
        found = tolerax.batched_least_squares(
            RESIDUALS, w, (data[0], f), tolerance=1e-10, ridge=1e-2, **options
        )
        return jnp.sum(jnp.sin(found.w))

    dense = jax.jit(jax.grad(loss))(data[1])
    cg = jax.jit(jax.grad(lambda f: loss(f, solver=MATRIX_FREE, hessian="cg")))(data[1])
    np.testing.assert_allclose(cg, dense, atol=1e-7 * float(jnp.max(jnp.abs(dense))))


def test_a_layer_takes_it():
    x = jnp.linspace(0, 1, 41)
    basis = lambda rate: jnp.stack([jnp.exp(-k * x / 2) - 1 for k in range(1, 5)])  # noqa: E731
    equation = tolerax.Equation(
        lambda u: jnp.stack([u, jnp.gradient(u, x[1])]),
        lambda z, rate: z[1] + rate * z[0],
        data=lambda rate: rate,
        lift=lambda rate: jnp.ones(41),
    )
    rates = jnp.array([1.0, 2.0])
    ends = []
    for solver in (SOLVER, MATRIX_FREE):
        options = {"faces": 10.0, "ridge": 1e-6, "solver": solver, "hessian": "cg"}
        layer = tolerax.HardConstrained(basis, equation, tolerax.Boxes((41,), (2,)), **options)
        field = jax.jit(lambda rates, layer=layer: layer(rates))(rates)
        assert names(field.lanes) == ["ok", "ok"]
        ends.append(field.u[:, -1])
    # Errors of 1e-8 in the energy norm are at most 1e-5 in coefficients with a ridge of 1e-6.
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)


def test_lengths_of_columns_are_estimated():
    rng = np.random.default_rng(0)
    # With 5 diagonals no two rows of a group share a column.
    band = sum(np.diag(rng.normal(size=60 - abs(k)), k) for k in range(-2, 3)) * np.arange(1, 61)
    found = squared_lengths(lambda v: band.T @ v, jnp.zeros(60))
    np.testing.assert_allclose(found, np.sum(band**2, axis=0), rtol=1e-12)
    full = jnp.asarray(rng.normal(size=(300, 400)) * np.geomspace(1, 1e3, 400))
    ratio = squared_lengths(lambda v: full.T @ v, jnp.zeros(300)) / jnp.sum(full**2, axis=0)
    # Distributed like chi^2 with 16 degrees of freedom: 1e-4 of them lie outside of this.
    assert float(jnp.mean(ratio)) == pytest.approx(1, abs=0.1)
    assert float(jnp.min(ratio)) > 0.15
    assert float(jnp.max(ratio)) < 3.2


def test_bad_input_is_named():
    data, w = lanes()
    with pytest.raises(ValueError, match="block is 0"):
        GaussNewtonCG(block=0)
    for name in ("max_steps", "max_products"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            GaussNewtonCG(**{name: 0})
    with pytest.raises(ValueError, match="ridge is -1"):
        MATRIX_FREE(RESIDUALS, w, data, ridge=-1.0)
    with pytest.raises(ValueError, match="leading axis of lanes"):
        MATRIX_FREE(RESIDUALS, w, jax.tree.map(lambda leaf: leaf[0], data))
    with pytest.raises(ValueError, match=r"residuals returned shape \(3, 3\)"):
        MATRIX_FREE(lambda w, _: jnp.outer(w, w), w)
    with pytest.raises(TypeError, match="residuals is 3"):
        MATRIX_FREE(3, w, data)
