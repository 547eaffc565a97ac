"""MINRES, flexible CG and flexible GMRES against dense algebra.

Facts used. In exact arithmetic a Krylov method ends after as many steps as the preconditioned
matrix has distinct eigenvalues (the degree of its minimal polynomial). A saddle-point matrix with
the ideal block-diagonal preconditioner diag(A, B A^-1 B') has three: 1 and (1 +- sqrt 5) / 2
(Murphy, Golub, Wathen 2000). Residuals here are recomputed, so `error` is exact up to rounding.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerax.inner import CG, FGMRES, GMRES, MINRES, FlexibleCG
from tolerax.inner.metric import definite_norm

N = 20
SEEDS = st.integers(0, 2**32 - 1)


def rotation(rng, n=N):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def symmetric(rng, eigenvalues):
    q = rotation(rng, len(eigenvalues))
    return (q * eigenvalues[None]) @ q.T


def matrix_for(method, rng):
    """A matrix that the method is made for, with sigma_min = 1."""
    sizes = np.concatenate([[1.0], np.exp(rng.uniform(0, 4, N - 1))])
    if method == "FlexibleCG":
        return symmetric(rng, sizes)
    signs = np.where(rng.uniform(size=N) < 0.5, -1.0, 1.0)
    if method == "MINRES":
        return symmetric(rng, signs * sizes)
    return (rotation(rng) * sizes[None]) @ rotation(rng)


METHODS = {"MINRES": MINRES(), "FlexibleCG": FlexibleCG(), "FGMRES": FGMRES(restart=N)}


@eqx.filter_jit
def solve(method, matrix, b, **options):
    return method(lambda v: matrix @ v, b, **options)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, power=st.floats(-9, 0), cold=st.booleans())
def test_the_error_is_what_was_asked_for(name, seed, power, cold):
    rng = np.random.default_rng(seed)
    matrix = matrix_for(name, rng)
    b, guess = rng.normal(size=(2, N))
    guess = np.zeros(N) if cold else guess
    tolerance = 10.0**power
    # As an array another tolerance does not compile again.
    result = solve(METHODS[name], matrix, b, tolerance=jnp.asarray(tolerance), guess=guess)
    assert bool(result.converged)
    true = np.linalg.norm(np.linalg.solve(matrix, b) - result.x)
    # sigma_min = 1; rounding of the dense solve is about eps cond |x|.
    assert true <= float(result.error) + 1e-12
    assert float(result.error) <= 1.01 * tolerance
    np.testing.assert_allclose(result.residual, b - matrix @ result.x, atol=1e-12)
    assert int(result.products) <= int(result.iterations) + 3


@pytest.mark.parametrize("name", METHODS)
def test_as_many_steps_as_distinct_eigenvalues(name):
    rng = np.random.default_rng(0)
    values = np.repeat([1.0, 2.0, 5.0, 9.0], N // 4)
    if name != "FlexibleCG":
        values = values * np.where(np.arange(N) % 2, -1, 1)
    distinct = len(set(values))
    matrix, b = symmetric(rng, values), rng.normal(size=N)
    result = solve(METHODS[name], matrix, b, tolerance=1e-9)
    assert bool(result.converged)
    assert int(result.iterations) <= distinct


@pytest.mark.parametrize("name", ["MINRES", "FGMRES"])
def test_the_ideal_block_preconditioner_needs_three_steps(name):
    rng = np.random.default_rng(1)
    a = symmetric(rng, np.exp(rng.uniform(0, 3, N)))
    c = rng.normal(size=(8, N))
    schur = c @ np.linalg.solve(a, c.T)
    kkt = jnp.asarray(np.block([[a, c.T], [c, np.zeros((8, 8))]]))
    inverse = jax.scipy.linalg.block_diag(np.linalg.inv(a), np.linalg.inv(schur))
    method = METHODS[name]
    b = jnp.asarray(rng.normal(size=N + 8))
    result = method(lambda v: kkt @ v, b, tolerance=1e-8, preconditioner=lambda r: inverse @ r)
    assert bool(result.converged)
    assert int(result.iterations) == 3


def test_minres_bounds_the_error_in_the_norm_of_the_preconditioner():
    rng = np.random.default_rng(2)
    p = symmetric(rng, np.exp(rng.uniform(-2, 2, N)))
    matrix = matrix_for("MINRES", rng)
    scaled = np.linalg.eigvals(np.linalg.solve(p, matrix)).real
    c = np.min(np.abs(scaled))
    b, inverse = rng.normal(size=N), jnp.asarray(np.linalg.inv(p))
    exact = np.linalg.solve(matrix, b)
    for tolerance in (1.0, 1e-3, 1e-6):
        result = MINRES()(
            lambda v: matrix @ v,
            jnp.asarray(b),
            tolerance=tolerance,
            lower_bound=c,
            preconditioner=lambda r: inverse @ r,
        )
        e = exact - np.asarray(result.x)
        assert np.sqrt(e @ p @ e) <= float(result.error) + 1e-10 <= 1.01 * tolerance + 1e-10


@pytest.mark.parametrize("method", [MINRES(), GMRES(restart=N)])
def test_a_preconditioner_that_is_not_positive_definite_is_no_residual_of_0(method):
    rng = np.random.default_rng(3)
    matrix, b = jnp.asarray(symmetric(rng, np.linspace(1.0, 4.0, N))), rng.normal(size=N)
    diagonal = eqx.filter_jit(
        lambda p, relative: method(
            lambda v: matrix @ v,
            jnp.asarray(b),
            tolerance=1e-8,
            relative=relative,
            preconditioner=lambda r: p * r,
        )
    )
    for p in (-np.ones(N), np.where(np.arange(N) % 3 == 0, -1.0, 1.0), np.zeros(N)):
        for relative in (0.0, 0.1):
            result = diagonal(jnp.asarray(p), jnp.asarray(relative))
            assert not bool(result.converged)
            assert float(result.error) == np.inf
    assert bool(diagonal(jnp.ones(N), jnp.asarray(0.0)).converged)


def test_rounding_does_not_make_a_norm_infinite():
    # Products of 1e-160 vanish, and the angle between r and P^-1 r is 1e-6 at the condition 1e12.
    inverse = 10.0 ** jnp.linspace(-6, 6, N)
    r = inverse**-0.5 / jnp.linalg.norm(inverse**-0.5)
    for size in (1.0, 1e-100, 1e-155, 1e-300, 0.0):
        assert float(definite_norm(size * r, inverse * size * r)) < 1e3


@pytest.mark.parametrize("method", [FlexibleCG(), FGMRES(restart=30)])
def test_a_preconditioner_that_changes_from_step_to_step(method):
    """A few steps of another Krylov method: not linear in the residual."""
    matrix = jnp.geomspace(1, 1e3, 300)
    b = jnp.asarray(np.random.default_rng(3).normal(size=300))

    def inner(r):
        cg = CG(max_steps=10)
        return cg(lambda v: matrix * v, r, lower_bound=jnp.ones(300), tolerance=0.0).x

    flexible = method(lambda v: matrix * v, b, tolerance=1e-6, preconditioner=inner)
    plain = method(lambda v: matrix * v, b, tolerance=1e-6)
    assert bool(flexible.converged)
    # A product outside now stands for ten inside: a quarter of the steps is far from a given.
    assert 4 * int(flexible.iterations) <= int(plain.iterations)


def test_a_preconditioner_that_turns_away_does_no_harm():
    rng = np.random.default_rng(4)
    matrix = jnp.asarray(symmetric(rng, np.geomspace(1, 30, N)))
    b = jnp.asarray(rng.normal(size=N))
    away = FlexibleCG(memory=N)(
        lambda v: matrix @ v, b, tolerance=1e-8, preconditioner=lambda r: -r
    )
    plain = FlexibleCG(memory=N)(lambda v: matrix @ v, b, tolerance=1e-8)
    assert bool(away.converged)
    assert int(away.iterations) == int(plain.iterations)


@pytest.mark.parametrize("name", METHODS)
def test_limits_guesses_and_faults(name):
    rng = np.random.default_rng(5)
    matrix, b = jnp.asarray(matrix_for(name, rng)), jnp.asarray(rng.normal(size=N))
    short = eqx.tree_at(lambda m: m.max_steps, METHODS[name], 3)
    result = solve(short, matrix, b, tolerance=1e-9)
    assert not bool(result.converged)
    assert int(result.iterations) == 3
    np.testing.assert_allclose(result.error, jnp.linalg.norm(b - matrix @ result.x), rtol=1e-12)
    # A guess that is good enough costs one product to see it and one to say so.
    exact = jnp.linalg.solve(matrix, b)
    known = solve(METHODS[name], matrix, b, tolerance=1e-6, guess=exact)
    np.testing.assert_array_equal(known.x, exact)
    assert int(known.iterations) == 0
    # Relative to the error of the guess.
    loose = solve(METHODS[name], matrix, b, tolerance=0.0, relative=0.1)
    assert bool(loose.converged)
    assert float(loose.error) <= 0.101 * float(loose.first_error)
    broken = solve(METHODS[name], matrix.at[0, 0].set(jnp.nan), b, tolerance=1e-6)
    assert not bool(broken.converged)
    assert float(broken.error) == np.inf
    zero = solve(METHODS[name], matrix, jnp.zeros(N), tolerance=1e-6)
    assert bool(zero.converged)
    np.testing.assert_array_equal(zero.x, 0)


def test_flexible_cg_sees_that_a_matrix_is_not_definite():
    matrix = jnp.diag(jnp.array([1.0, -1.0, 2.0]))
    result = FlexibleCG()(lambda v: matrix @ v, jnp.array([1.0, 2.0, 1.0]), tolerance=1e-8)
    assert not bool(result.converged)


def test_a_restarted_fgmres_still_converges():
    rng = np.random.default_rng(6)
    matrix = jnp.asarray(np.eye(60) * 3 + rng.normal(size=(60, 60)) / np.sqrt(60))
    b = jnp.asarray(rng.normal(size=60))
    result = FGMRES(restart=7)(lambda v: matrix @ v, b, tolerance=1e-9)
    assert bool(result.converged)
    assert int(result.iterations) > 7


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: FlexibleCG(memory=0), "memory is 0"), (lambda: FGMRES(restart=0), "restart is 0")],
)
def test_sizes_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_minres_without_a_last_look_knows_its_residual():
    A = jnp.asarray(np.random.default_rng(0).normal(size=(12, 12)))
    A = A + A.T
    for tolerance in (1e-1, 1e-6):
        looked, not_looked = (
            MINRES()(lambda v: A @ v, jnp.ones(12), tolerance=tolerance, exact_residual=exact)
            for exact in (True, False)
        )
        np.testing.assert_allclose(not_looked.error, looked.error, rtol=1e-4, atol=1e-12)
        assert int(not_looked.products) == int(looked.products) - 1
