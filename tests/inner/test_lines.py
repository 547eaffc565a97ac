"""Alternating lines against dense algebra: what is inverted, its spectrum, what it saves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import CG, AlternatingLines


def coupling(coefficient, axis, shape):
    """The matrix of differences between neighbours along one axis, with these coefficients."""
    index = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, 0)
    first, second = index[:-1].ravel(), index[1:].ravel()
    c = np.moveaxis(coefficient, axis, 0).ravel()
    matrix = np.zeros((np.prod(shape),) * 2)
    np.add.at(matrix, (first, first), c)
    np.add.at(matrix, (second, second), c)
    np.add.at(matrix, (first, second), -c)
    np.add.at(matrix, (second, first), -c)
    return matrix


def some_grid(rng, shape, decades=2.0):
    rows, columns = shape
    down = 10 ** rng.uniform(-decades, decades, size=(rows - 1, columns))
    right = 10 ** rng.uniform(-decades, decades, size=(rows, columns - 1))
    return down, right


@eqx.filter_jit
def applied(lines, shape):
    n = int(np.prod(shape))
    return jax.vmap(lambda e: lines.mv(e.reshape(shape)).reshape(-1))(jnp.eye(n)).T


@pytest.mark.parametrize("shape", [(4, 5), (1, 6), (6, 1), (1, 1)])
def test_the_mean_of_two_products_with_cholesky_factors(shape):
    rng = np.random.default_rng(0)
    down, right = some_grid(rng, shape)
    matrix = np.asarray(applied(AlternatingLines.of(jnp.asarray(down), jnp.asarray(right)), shape))
    first, second = coupling(down, 0, shape), coupling(right, 1, shape)
    a = 4 * max(np.max(down, initial=0), np.max(right, initial=0))
    s = (1 + np.sqrt(1 + 2 * a)) / 2
    eye = np.eye(len(first))
    expected = np.zeros_like(first)
    for order in (slice(None), slice(None, None, -1)):
        turned = (s * eye + first)[order, order]
        L = np.linalg.cholesky(turned)[order, order]
        expected += 0.5 * s * np.linalg.inv(L @ (s * eye + second) @ L.T)
    np.testing.assert_allclose(matrix, expected, rtol=1e-11, atol=1e-13)
    assert np.linalg.eigvalsh(0.5 * (matrix + matrix.T))[0] > 0


def test_with_constant_coefficients_the_matrix_is_at_most_s_times_too_large():
    shape, c = (12, 10), 30.0
    down, right = np.full((11, 10), c), np.full((12, 9), c)
    lines = AlternatingLines.of(jnp.asarray(down), jnp.asarray(right))
    A = np.eye(120) + coupling(down, 0, shape) + coupling(right, 1, shape)
    half = np.linalg.cholesky(A)
    values = np.linalg.eigvalsh(half.T @ np.asarray(applied(lines, shape)) @ half)
    assert 1 / float(lines.shift) * (1 - 1e-10) <= values[0]
    assert values[-1] <= 1 + 1e-10
    assert values[-1] / values[0] < 0.1 * np.linalg.cond(A)


def test_without_coupling_nothing_changes_and_grids_are_independent():
    r = jnp.arange(40.0).reshape(2, 4, 5)
    none = AlternatingLines.of(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4, 4)))
    np.testing.assert_array_equal(none.mv(r), r)
    rng = np.random.default_rng(1)
    pairs = [some_grid(rng, (4, 5)) for _ in range(2)]
    down, right = (jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in range(2))
    both = AlternatingLines.of(down, right)
    other = both.mv(r.at[1].add(1.0))
    np.testing.assert_array_equal(both.mv(r)[0], other[0])
    assert not np.array_equal(both.mv(r)[1], other[1])


def test_single_precision_stays():
    ones = jnp.ones((3, 4), jnp.float32)
    lines = AlternatingLines.of(ones[:-1], ones[:, :-1])
    assert lines.mv(ones).dtype == jnp.float32


def test_coefficients_that_jump_take_fewer_products():
    rng = np.random.default_rng(2)
    shape = (24, 24)
    down, right = some_grid(rng, shape, decades=1.5)
    lines = AlternatingLines.of(jnp.asarray(down), jnp.asarray(right))
    A = jnp.asarray(np.eye(576) + coupling(down, 0, shape) + coupling(right, 1, shape))
    b = jnp.asarray(rng.normal(size=576))
    known = {"lower_bound": jnp.ones(576), "tolerance": 1e-6}
    plain = CG()(lambda v: A @ v, b, **known)
    inverse = lambda r: lines.mv(r.reshape(shape)).reshape(-1)  # noqa: E731
    helped = CG()(lambda v: A @ v, b, preconditioner=inverse, **known)
    assert plain.converged
    assert helped.converged
    # A tenth of the condition is a third of the steps.
    assert helped.iterations < 0.4 * plain.iterations
