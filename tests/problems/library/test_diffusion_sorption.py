"""The family of diffusion and sorption: its reference against refinement, its equation against the
reference; and the pieces of a Fourier neural operator."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.problems.library import DiffusionSorption, FourierOperator, SorptionBasis
from tolerax.problems.library.diffusion_sorption import HELD, retardation, stored
from tolerax.problems.library.operators import difference_matrix, legendre_products

FAMILY = DiffusionSorption(17, 13, spans=2)
SOILS = FAMILY.sample(jax.random.key(0), 3)


def relative(u, v):
    return np.linalg.norm(u - v) / np.linalg.norm(v)


def test_the_reference_converges_with_second_order():
    coarse, fine, finest = (FAMILY.solve(SOILS, refine) for refine in (2, 4, 8))
    assert relative(fine, finest) < 1e-3
    # A third of a quarter is left where errors are C h^2: 4 = (1 - 1/16) / (1/4 - 1/16) ... = 5.
    assert 3.5 < relative(coarse, finest) / relative(fine, finest) < 6.5
    assert np.all(finest > 0)


def test_the_reference_obeys_the_equation_and_its_balance():
    u, equation = FAMILY.solve(SOILS, 8), FAMILY.equation
    z = jax.vmap(equation.channels)(u)
    np.testing.assert_allclose(u[:, :, 0], SOILS.u0, atol=1e-12)
    np.testing.assert_allclose(jax.vmap(FAMILY.lift)(SOILS)[:, 0], u[:, 0], atol=1e-12)
    size = np.abs(z[:, 3]).max()
    inside = (slice(None), slice(None), slice(1, None), slice(3, None))
    D, n, outlet = jax.vmap(equation.data)(SOILS)
    data = (D[:, None, None], n[:, None, None], outlet[:, 1:, 3:])
    rows = equation.residual(jnp.moveaxis(z[inside], 1, 0), data)
    assert np.sqrt(np.mean(rows**2)) < 0.02 * size
    assert np.abs(jax.vmap(FAMILY.balance)(z, SOILS)).max() < 5e-3


def test_a_basis_vanishes_where_values_are_given():
    network = SorptionBasis(FAMILY, 3, width=4, modes=2, layers=1, key=jax.random.key(0))
    basis = eqx.filter_jit(network)(jax.tree.map(lambda leaf: leaf[0], SOILS))
    assert basis.shape == (3, 17, 13)
    assert not np.any(basis[:, 0])
    assert not np.any(basis[:, :, 0])
    assert np.all(np.any(basis[:, 1:, 1:] != 0, axis=(1, 2)))
    # Nothing but the operator is trained: not the points of the grid.
    weights = [jax.tree.leaves(eqx.filter(n, eqx.is_array)) for n in (network, network.operator)]
    assert len(weights[0]) == len(weights[1])


def test_products_of_legendre_polynomials_are_orthogonal():
    x, weight = np.polynomial.legendre.leggauss(6)
    P = legendre_products(10, (x + 1) / 2, (x + 1) / 2)
    G = np.einsum("ixy,jxy,x,y->ij", P, P, weight, weight)
    np.testing.assert_allclose(G, np.diag(np.diag(G)), atol=1e-12)
    assert np.all(np.diag(G) > 0)


def test_a_fourier_operator_commutes_with_shifts_of_periodic_fields():
    network = FourierOperator(2, 3, width=4, modes=(2, 2), layers=2, key=jax.random.key(1))
    v = jax.random.normal(jax.random.key(2), (2, 8, 6))
    run = eqx.filter_jit(network)
    moved = run(jnp.roll(v, (3, 1), (1, 2)))
    np.testing.assert_allclose(moved, jnp.roll(run(v), (3, 1), (1, 2)), atol=1e-12)


@pytest.mark.parametrize("derivative", [1, 2])
def test_differences_are_exact_for_polynomials(derivative):
    D = difference_matrix(9, 0.25, derivative)
    p = np.polynomial.Polynomial([0.3, -1, 2, 0.5, 1.5])
    x = 0.25 * np.arange(9)
    np.testing.assert_allclose(D @ p(x), p.deriv(derivative)(x), atol=1e-10)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="nx is 3"):
        DiffusionSorption(3)
    with pytest.raises(ValueError, match="points is 12"):
        difference_matrix(9, 1.0, points=12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sorption_has_digits_at_0_and_far_below(dtype):
    """Solves for coefficients try concentrations below 0."""
    u = jnp.array([0.0, 1e-4, 3e-3, 0.2, 1.0, 5.0, 100.0, 1e5], dtype)
    n, eps = jnp.asarray(0.85, dtype), np.finfo(dtype).eps
    # Positive parts of u and -u have the product 1e-6 / 4.
    root = np.sqrt(np.asarray(u, float) ** 2 + 1e-6)
    above = (np.asarray(u, float) + root) / 2
    exact = 1 + HELD * 0.85 * np.stack([above, 0.25e-6 / above]) ** 0.85 / root
    np.testing.assert_allclose(jnp.stack([retardation(u, n), retardation(-u, n)]), exact, 20 * eps)
    # R is the derivative of m, and has one itself.
    both = jnp.concatenate([u, -u])
    slope = jax.vmap(jax.grad(stored), (0, None))(both, n)
    np.testing.assert_allclose(slope, retardation(both, n), rtol=20 * eps)
    assert np.all(np.isfinite(jax.vmap(jax.grad(retardation), (0, None))(both, n)))
