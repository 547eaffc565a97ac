"""Diffusion and its V-cycle: the matrix against its definition, the cycle as a preconditioner."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import MINRES, Diffusion, Laplacian, Multigrid


def dense(operator, shape):
    size = int(np.prod(shape))
    columns = jax.vmap(lambda e: operator(e.reshape(shape)).reshape(-1))
    return np.asarray(jax.jit(columns)(jnp.eye(size))).T


def coefficient(shape, contrast):
    """exp(contrast s) with s between -1 and 1."""
    grids = jnp.meshgrid(*[jnp.linspace(0, 1, n + 2) for n in shape], indexing="ij")
    wave = 1.0
    for i, x in enumerate(grids):
        wave = wave * jnp.sin(5 * x + i)
    return jnp.exp(contrast * wave)


def test_with_a_constant_coefficient_it_is_the_laplacian():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    operator = Diffusion.of(jnp.full((7, 10), 3.0), 2.0)
    expected = 3 * Laplacian((5, 8)).mv(u) + 2 * u
    np.testing.assert_allclose(operator.mv(u), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 3)])
def test_symmetric_with_the_diagonal_it_says(shape):
    operator = Diffusion.of(coefficient(shape, 2.0), 0.7, spacing=0.3)
    matrix = dense(operator.mv, shape)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix).reshape(shape), operator.diagonal, rtol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] > 0.7


def test_fluxes_in_series():
    """-(k u')' = 0 between 0 and 1 with a jump of k halfway between two points: the flux of the
    harmonic mean is exact, so u is linear on both sides with slopes that go like 1 / k."""
    n = 9
    k = jnp.where(jnp.arange(n + 2) <= n // 2, 1.0, 100.0)
    operator = Diffusion.of(k)
    h = 1 / (n + 1)
    # u(1) = 1 enters as a right-hand side at the last point.
    load = jnp.zeros(n).at[-1].set(100.0 / h**2)
    u = np.linalg.solve(dense(operator.mv, (n,)), load)
    flux = 1 / (0.45 / 1 + 0.55 / 100)
    np.testing.assert_allclose(u[:4], flux * h * np.arange(1, 5), rtol=1e-10)
    np.testing.assert_allclose(1 - u[4:], flux * h * np.arange(5, 0, -1) / 100, rtol=1e-8)


@pytest.mark.parametrize("shape", [(15,), (15, 7)])
def test_a_cycle_is_symmetric_and_positive(shape):
    operator = Diffusion.of(coefficient(shape, 2.0))
    cycle = dense(Multigrid.of(operator, coarsest=3), shape)
    np.testing.assert_allclose(cycle, cycle.T, atol=1e-12 * np.abs(cycle).max())
    root = np.linalg.cholesky(cycle)
    spectrum = np.linalg.eigvalsh(root.T @ dense(operator.mv, shape) @ root)
    # The cycle alone halves the error, in the energy norm: |I - M A| < 1/2.
    assert 0.5 < spectrum[0] <= spectrum[-1] < 1.5


def test_steps_grow_neither_with_the_grid_nor_with_the_contrast():
    @eqx.filter_jit
    def steps(operator, cycle, b):
        flat = lambda v: operator.mv(v.reshape(operator.shape)).reshape(-1)  # noqa: E731
        solve = MINRES()(flat, b, tolerance=0.0, relative=1e-8, preconditioner=cycle)
        return solve.iterations, solve.converged

    counts = []
    for n in (15, 63):
        for contrast in (0.0, 5.0):  # from 1 : 1 to 22,000 : 1
            operator = Diffusion.of(coefficient((n, n), contrast))
            b = jnp.asarray(np.random.default_rng(n).normal(size=n * n))
            count, converged = steps(operator, Multigrid.of(operator), b)
            assert bool(converged)
            counts.append(int(count))
    assert max(counts) <= 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diffusion.of(jnp.ones((2, 5))), r"coefficient has shape \(2, 5\)"),
        (lambda: Diffusion.of(jnp.ones((5, 5)), spacing=-1.0), "spacing is -1.0"),
        (lambda: Multigrid.of(Diffusion.of(jnp.ones((5, 5))), sweeps=0), "sweeps is 0"),
        (lambda: Multigrid.of(Diffusion.of(jnp.ones((102, 102)))), "coarsens to"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
