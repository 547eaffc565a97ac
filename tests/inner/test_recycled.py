"""The learned preconditioner against dense algebra: its form, its floor, the solves it serves."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerax.inner import CG, Recycled

N, RANK, PAIRS = 12, 4, 3
SEEDS = st.integers(0, 2**32 - 1)


def outliers(rng, count=RANK, size=1e4):
    """A diagonal D and A = D + B B' with a few eigenvalues of D^-1 A that are far above 1."""
    d = 10 ** rng.uniform(-3, 3, N)
    b = np.sqrt(d)[:, None] * rng.normal(size=(N, count)) * np.sqrt(size)
    return d, np.diag(d) + b @ b.T


def dense(p):
    factor = np.asarray(p.factor)
    return np.diag(np.asarray(p.diagonal)) + factor @ factor.T


@eqx.filter_jit
def of(d, factor):
    return Recycled.of(d, factor, pairs=PAIRS)


@eqx.filter_jit
def learn(p, directions, products):
    return p.learned(directions, products)


@eqx.filter_jit
def solve(A, b, d, tolerance, memory):
    cg = CG()
    return cg(lambda v: A @ v, b, lower_bound=d, tolerance=tolerance, memory=memory)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_the_floor_lies_under_the_spectrum_of_any_matrix_above_the_diagonal(seed):
    rng = np.random.default_rng(seed)
    d, A = outliers(rng, size=10 ** rng.uniform(-2, 6))
    # A factor that has nothing to do with A, of any size.
    factor = np.sqrt(d)[:, None] * rng.normal(size=(N, RANK)) * 10 ** rng.uniform(-4, 5, RANK)
    p = of(jnp.asarray(d), jnp.asarray(factor))
    # Eigenvalues of P^-1 A, from the product that is really applied.
    inverse = np.stack([p.solve(e) for e in jnp.eye(N)])
    half = np.linalg.cholesky(A)
    eigenvalues = np.linalg.eigvalsh(half.T @ (0.5 * (inverse + inverse.T)) @ half)
    rounding = 1e-14 * eigenvalues[-1]
    assert 0 < p.floor <= eigenvalues[0] + rounding
    np.testing.assert_allclose(inverse @ dense(p), np.eye(N), atol=1e-3)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_new_directions_become_exact_and_the_rest_stays(seed):
    rng = np.random.default_rng(seed)
    d, A = outliers(rng, count=N, size=10.0)
    p = of(jnp.asarray(d), jnp.zeros((N, 2 * PAIRS)))
    for _ in range(2):
        directions = rng.normal(size=(PAIRS, N)) / np.sqrt(d)
        p = learn(p, jnp.asarray(directions), jnp.asarray(directions @ A))
        matrix, scale = dense(p), np.sqrt(np.diag(A))
        missed = (matrix @ directions.T - A @ directions.T) / scale[:, None]
        # What is left of the old factor there: 0.03 of it against its square.
        size = np.linalg.norm(A @ directions.T / scale[:, None], axis=0)
        assert np.all(np.linalg.norm(missed, axis=0) <= 0.25 * size)
    # The directions of the first round still have a place.
    assert np.count_nonzero(p.weights) > PAIRS


def test_directions_that_are_no_number_or_nothing_teach_nothing():
    d, _ = outliers(np.random.default_rng(1))
    p = of(jnp.asarray(d), jnp.zeros((N, RANK)))
    for bad in (jnp.zeros((PAIRS, N)), jnp.full((PAIRS, N), jnp.nan)):
        after = learn(p, bad, bad)
        np.testing.assert_array_equal(after.factor, p.factor)
        assert after.floor == 1


@given(seed=SEEDS)
@settings(max_examples=20)
def test_bounds_hold_with_what_was_learned_from_another_matrix(seed):
    rng = np.random.default_rng(seed)
    d, A = outliers(rng, count=N, size=10 ** rng.uniform(0, 4))
    _, other = outliers(rng, count=N, size=10 ** rng.uniform(0, 4))
    directions = rng.normal(size=(PAIRS, N)) / np.sqrt(d)
    p = learn(
        of(jnp.asarray(d), jnp.zeros((N, RANK))),
        jnp.asarray(directions),
        jnp.asarray(directions @ other),
    )
    b = A @ (rng.normal(size=N) / np.sqrt(d))
    first = np.sqrt(b @ np.linalg.solve(A, b))
    for relative in (0.5, 1e-2, 1e-4):
        found = solve(A, jnp.asarray(b), jnp.asarray(d), relative * first, p)
        e = np.asarray(found.x) - np.linalg.solve(A, b)
        assert np.sqrt(e @ A @ e) <= found.error + 1e-12 * first
        assert found.converged


def test_later_solves_are_cheaper():
    rng = np.random.default_rng(3)
    d, A = outliers(rng, count=PAIRS)
    memory = of(jnp.asarray(d), jnp.zeros((N, RANK)))
    steps = []
    for _ in range(3):
        b = jnp.asarray(A @ (rng.normal(size=N) / np.sqrt(d)))
        found = solve(A, b, jnp.asarray(d), 1e-6, memory)
        memory, steps = found.memory, [*steps, int(found.iterations)]
    # A has PAIRS eigenvalues other than that of D: they are learned in one solve, and P = A.
    assert steps[0] >= PAIRS
    assert max(steps[1:]) <= 2


def test_without_a_memory_there_is_none():
    assert CG()(lambda v: v, jnp.ones(2), lower_bound=jnp.ones(2), tolerance=1.0).memory is None


@pytest.mark.parametrize("rank", [1, RANK])
def test_the_heaviest_columns_stay(rank):
    d = jnp.ones(N)
    factor = jnp.eye(N)[:, :RANK] * jnp.array([[1.0, 4.0, 3.0, 2.0]])
    p = Recycled.of(d, factor, pairs=PAIRS, rank=rank)
    np.testing.assert_allclose(p.weights, [16.0, 9.0, 4.0, 1.0][:rank], rtol=1e-12)
