"""Randomized low-rank preconditioners: spectra against theory, and what they save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tolerax.inner import CG, Laplacian, Nystrom

KEY = jax.random.key(0)


def dense(P, n):
    return np.asarray(jax.vmap(P.mv)(jnp.eye(n)).T)


def spectrum(P, matrix):
    """The eigenvalues of the preconditioned matrix, which are those of a symmetric one."""
    root = np.linalg.cholesky(dense(P, len(matrix)))
    return np.linalg.eigvalsh(root.T @ matrix @ root)


def decaying(n, seed, power=3.0):
    """A matrix with eigenvalues `i^-power` in random directions."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    values = (1.0 + np.arange(n)) ** -power
    return jnp.asarray(Q * values @ Q.T), values


def test_the_condition_number_is_that_of_the_theorem():
    # Frangella, Tropp, Udell: below 28 on average for a rank of 2 ceil(1.5 d) + 1.
    n, mu, conditions = 200, 1e-3, []
    A, values = decaying(n, seed=0)
    d = np.sum(values / (values + mu))
    rank = 2 * int(np.ceil(1.5 * d)) + 1
    assert rank < n / 2
    for key in jax.random.split(KEY, 8):
        P = Nystrom.of(lambda v: A @ v, lambda r: r / mu, jnp.ones(n), key=key, rank=rank)
        found = spectrum(P, np.asarray(A) + mu * np.eye(n))
        # A' lies below A.
        assert found[0] >= 1 - 1e-9
        conditions.append(found[-1] / found[0])
    assert np.mean(conditions) < 28
    # Without, it is 1000.
    assert (values[0] + mu) / (values[-1] + mu) > 900


def test_it_is_the_inverse_where_the_rank_suffices():
    rng = np.random.default_rng(1)
    n, rank = 40, 6
    half = rng.normal(size=(n, rank))
    A = jnp.asarray(half @ half.T)
    R = jnp.asarray(np.diag(3.0 + np.arange(n)) - np.eye(n, k=1) - np.eye(n, k=-1))
    inverse = jnp.linalg.inv(R)
    P = Nystrom.of(lambda v: A @ v, lambda r: inverse @ r, jnp.ones(n), key=KEY, rank=rank + 3)
    np.testing.assert_allclose(dense(P, n), np.linalg.inv(A + R), atol=1e-12)
    known = np.linalg.eigvals(np.linalg.solve(R, A)).real
    np.testing.assert_allclose(P.weights, np.sort(known)[::-1][: rank + 3], atol=1e-10)


def test_a_smoothing_operator_beside_a_differential_one_needs_few_products():
    # What heat leaves of a field, observed, beside a penalty on its slopes: R^-1 A falls like
    # exp(-2 t k^2) / k^2, and a few of its eigenvalues are above 1.
    n, beta = 40, 1e-5
    laplacian = Laplacian((n, n))
    heat = lambda u: laplacian.function(lambda k: jnp.exp(-0.01 * k), u)  # noqa: E731
    product = lambda u: heat(heat(u))  # noqa: E731
    inverse = lambda r: laplacian.solve(r) / beta  # noqa: E731
    R = lambda u: beta * laplacian.mv(u)  # noqa: E731
    P = Nystrom.of(product, inverse, jnp.zeros((n, n)), key=KEY, rank=20)
    assert P.weights[-1] < 1 < P.weights[4]
    flat = lambda f: lambda v: f(v.reshape(n, n)).reshape(-1)  # noqa: E731
    b = product(jax.random.normal(KEY, (n, n))).reshape(-1)

    def iterations(preconditioner):
        result = CG()(
            flat(lambda u: product(u) + R(u)),
            b,
            lower_bound=jnp.full(n * n, beta * 2 * np.pi**2 * 0.99),
            tolerance=1e-9 * float(jnp.linalg.norm(b)),
            preconditioner=flat(preconditioner),
        )
        assert result.converged
        return int(result.iterations)

    assert iterations(P.mv) <= 0.4 * iterations(inverse)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_what_is_not_positive_is_left_out(sign):
    n = 12
    A = jnp.diag(jnp.where(jnp.arange(n) < 3, 5.0, sign * 2.0))
    P = Nystrom.of(lambda v: A @ v, lambda r: 0.5 * r, jnp.ones(n), key=KEY, rank=n)
    matrix = dense(P, n)
    # Positive definite, and the inverse of 2 + A where A is positive.
    expected = np.diag(np.where(np.arange(n) < 3, 1 / 7, 1 / 2))
    np.testing.assert_allclose(matrix, expected, atol=1e-12)


def test_nothing_to_approximate():
    P = Nystrom.of(jnp.zeros_like, lambda r: r / 3, jnp.ones(5), key=KEY, rank=2)
    np.testing.assert_array_equal(P.mv(jnp.arange(5.0)), jnp.arange(5.0) / 3)
    np.testing.assert_array_equal(P.weights, 0)


def test_pytrees_in_single_precision_under_jit():
    like = {"a": jnp.ones((2, 2), jnp.float32), "b": jnp.ones(3, jnp.float32)}
    scale = {"a": jnp.full((2, 2), 9.0, jnp.float32), "b": jnp.zeros(3, jnp.float32)}

    @jax.jit
    def made(key):
        product = lambda v: jax.tree.map(jnp.multiply, scale, v)  # noqa: E731
        return Nystrom.of(product, lambda r: r, like, key=key, rank=5).mv(like)

    z = made(KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(z)} == {np.dtype("float32")}
    np.testing.assert_allclose(z["a"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(z["b"], 1.0, rtol=1e-5)


@pytest.mark.parametrize(("rank", "named"), [(0, "rank is 0"), (4, "rank is 4: there are 3")])
def test_a_rank_that_makes_no_sense_is_named(rank, named):
    with pytest.raises(ValueError, match=named):
        Nystrom.of(lambda v: v, lambda r: r, jnp.ones(3), key=KEY, rank=rank)


def test_as_the_preconditioner_of_a_lower_level():
    # Ridge regression with columns of very different length and one penalty for each.
    n = 60
    X = jax.random.normal(KEY, (120, n)) * 0.7 ** jnp.arange(n)[None]
    b = X @ jnp.ones(n)

    def resembling(y, x):
        penalties = jnp.exp(x)
        gram = lambda v: X.T @ (X @ v)  # noqa: E731
        return Nystrom.of(gram, lambda r: r / penalties, y, key=jax.random.key(7), rank=25)

    def work(preconditioner):
        problem = tolerax.Bilevel(
            upper=lambda y, x: 0.5 * jnp.sum((y - 1) ** 2),
            lower=lambda y, x: 0.5 * jnp.sum((X @ y - b) ** 2) + 0.5 * jnp.exp(x) @ y**2,
            y0=jnp.zeros(n),
            strong_convexity=jnp.exp,
            self_concordance=0.0,
            upper_smoothness=1.0,
            preconditioner=preconditioner,
        )
        found = tolerax.solve(problem, tolerax.MAID(), jnp.full(n, -6.0), max_steps=3)
        return found.work.hessian_products, found.value

    (helped, value), (plain, other) = work(resembling), work(None)
    np.testing.assert_allclose(value, other, rtol=1e-3)
    assert helped < 0.5 * plain
