"""Fast Laplacian solves against the dense matrix of the stencil, and against smooth functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.inner import MINRES, Laplacian

pytestmark = pytest.mark.accelerator

SIDES = ["dirichlet", "neumann", "periodic"]


def dense(laplacian):
    """The matrix of the stencil, column by column."""
    size = int(np.prod(laplacian.shape))
    columns = jax.vmap(lambda e: laplacian.mv(e.reshape(laplacian.shape)).reshape(-1))
    return np.asarray(jax.jit(columns)(jnp.eye(size))).T


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (8,), (5, 4), (3, 4, 2)])
def test_the_eigenvectors_are_those_of_the_stencil(shape, side):
    laplacian = Laplacian(shape, boundary=side, spacing=[0.3 + 0.1 * i for i in range(len(shape))])
    matrix = dense(laplacian)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=shape))
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(laplacian.inverse(laplacian.transform(u)), u, atol=1e-13)
    applied = laplacian.inverse(laplacian.eigenvalues * laplacian.transform(u))
    np.testing.assert_allclose(applied, laplacian.mv(u), atol=1e-13 * scale)
    solved = laplacian.solve(u, shift=2.5)
    expected = np.linalg.solve(matrix + 2.5 * np.eye(u.size), np.ravel(u)).reshape(shape)
    np.testing.assert_allclose(solved, expected, atol=1e-12)
    np.testing.assert_allclose(laplacian.flat(2.5)(u.reshape(-1)), expected.ravel(), atol=1e-12)


def test_sides_may_differ_and_functions_of_the_operator():
    laplacian = Laplacian((6, 5), boundary=("periodic", "dirichlet"))
    values, vectors = np.linalg.eigh(dense(laplacian))
    u = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)))
    root = (vectors * np.sqrt(values)[None]) @ vectors.T @ np.ravel(u)
    np.testing.assert_allclose(laplacian.function(jnp.sqrt, u).reshape(-1), root, atol=1e-11)


@pytest.mark.parametrize("side", ["neumann", "periodic"])
def test_without_a_shift_the_mean_is_left_out(side):
    laplacian = Laplacian((9, 6), boundary=side)
    f = jnp.asarray(np.random.default_rng(2).normal(size=(9, 6)))
    u = laplacian.solve(f)
    assert abs(float(jnp.mean(u))) < 1e-14
    np.testing.assert_allclose(laplacian.mv(u), f - jnp.mean(f), atol=1e-11)


def test_second_order():
    """-u'' - v'' = f with u = sin(pi x) sin(2 pi y): four times smaller errors at half the step."""
    errors = []
    for n in (15, 31, 63):
        x, y = jnp.meshgrid(*2 * (jnp.arange(1, n + 1) / (n + 1),), indexing="ij")
        u = jnp.sin(jnp.pi * x) * jnp.sin(2 * jnp.pi * y)
        errors.append(float(jnp.max(jnp.abs(Laplacian((n, n)).solve(5 * jnp.pi**2 * u) - u))))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 2, atol=0.05)


def test_steps_of_a_preconditioned_solve_do_not_grow_with_the_grid():
    """-div(k grad u) with k between 1/e and e: the condition with the Laplacian is at most e^2."""
    steps = []
    for n in (15, 63):
        laplacian = Laplacian((n, n))
        x, y = jnp.meshgrid(*2 * (jnp.arange(n + 1) / n,), indexing="ij")
        k = jnp.exp(jnp.sin(5 * x) * jnp.cos(3 * y))

        def diffusion(u, k=k, n=n):
            u = jnp.pad(u.reshape(n, n), 1)
            total = 0.0
            for axis in (0, 1):
                inner = [slice(1, -1)] * 2
                inner[axis] = slice(None)
                flux = jnp.diff(u[tuple(inner)], axis=axis) * (n + 1)
                face = k[:, 1:] if axis == 0 else k[1:, :]
                total = total - jnp.diff(face * flux, axis=axis) * (n + 1)
            return total.reshape(-1)

        solve = MINRES()(
            diffusion,
            jnp.ones(n * n),
            tolerance=0.0,
            relative=1e-8,
            preconditioner=laplacian.flat(),
        )
        assert bool(solve.converged)
        steps.append(int(solve.iterations))
    assert max(steps) <= 35
    assert max(steps) - min(steps) <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "shape is"),
        ({"shape": (3, 0)}, "shape is"),
        ({"shape": (3,), "boundary": "robin"}, "boundary is 'robin'|violates type hint|Literal"),
        ({"shape": (3, 3), "boundary": ["neumann"]}, "boundary is"),
        ({"shape": (3,), "spacing": 0.0}, "spacing is 0.0"),
        ({"shape": (3,), "spacing": [1.0, 2.0]}, "spacing is"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Laplacian(**arguments)
