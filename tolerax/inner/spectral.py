"""Fast solves with the Laplacian of a regular grid: sine, cosine and Fourier transforms."""

from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

Boundary = Literal["dirichlet", "neumann", "periodic"]
Grid = Float[Array, "..."]


class Laplacian(eqx.Module):
    """`A = -Laplace` by second differences on a regular grid of any dimension, and `(A + s)^-1`.

    Solves are exact up to rounding: the eigenvectors of every axis are known, and a transform is a
    product with their matrix. Half of them are symmetric about the middle and half antisymmetric,
    so that two products of half the size do: n^(d+1) / 2 multiplications an axis for n points along
    each of d axes.

    - `shape`: unknowns along every axis.
    - `spacing`: the distance of neighbours, one number or one an axis; by default that of the unit
      interval, which is `1 / (n + 1)` with Dirichlet conditions and `1 / n` otherwise.
    - `boundary`: `"dirichlet"`: zero at the points next to the first and the last unknown.
      `"neumann"`: unknowns in the middle of cells, zero flux. `"periodic"`. One, or one an axis.

    As a preconditioner pass `lambda r: laplacian.solve(r, shift)`, or [`Laplacian.flat`][] for
    vectors. Passed as an argument to compiled code the matrices are no constants of the program.

    Source: Buzbee, Golub, Nielson (*SIAM J. Numer. Anal.* 7, 1970).

    >>> import jax.numpy as jnp
    >>> laplacian = Laplacian((31, 31))
    >>> f = jnp.ones((31, 31))
    >>> bool(jnp.allclose(laplacian.mv(laplacian.solve(f)), f))
    True
    """

    transforms: tuple["Folded", ...]
    values: tuple[Float[Array, " n"], ...]
    spacing: tuple[float, ...] = eqx.field(static=True)
    boundary: tuple[Boundary, ...] = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        spacing: float | Sequence[float] | None = None,
        boundary: Boundary | Sequence[Boundary] = "dirichlet",
    ):
        shape = tuple(shape)
        if not shape or any(n < 1 for n in shape):
            raise ValueError(f"shape is {shape}: give a positive number of unknowns an axis.")
        sides = (boundary,) * len(shape) if isinstance(boundary, str) else tuple(boundary)
        if len(sides) != len(shape):
            raise ValueError(f"boundary is {boundary!r}: give one, or one for each of {shape}.")
        for side in sides:
            if side not in ("dirichlet", "neumann", "periodic"):
                raise ValueError(f"boundary is {side!r}: use 'dirichlet', 'neumann' or 'periodic'.")
        if spacing is None:
            spacing = [
                1 / (n + 1) if side == "dirichlet" else 1 / n
                for n, side in zip(shape, sides, strict=True)
            ]
        steps = (spacing,) * len(shape) if isinstance(spacing, int | float) else tuple(spacing)
        if len(steps) != len(shape) or not all(h > 0 for h in steps):
            raise ValueError(f"spacing is {spacing}: give one positive number, or one an axis.")
        pairs = [_eigen(n, h, side) for n, h, side in zip(shape, steps, sides, strict=True)]
        self.transforms = tuple(q for q, _ in pairs)
        self.values = tuple(v for _, v in pairs)
        self.spacing, self.boundary = tuple(float(h) for h in steps), sides

    @property
    def shape(self) -> tuple[int, ...]:
        """Unknowns along every axis."""
        return tuple(v.shape[0] for v in self.values)

    @property
    def eigenvalues(self) -> Grid:
        """The eigenvalues of A on the grid of their modes: along every axis those of the symmetric
        eigenvectors, rising, then those of the antisymmetric ones."""
        total = jnp.zeros((), self.values[0].dtype)
        for axis, v in enumerate(self.values):
            ones = [1] * len(self.values)
            ones[axis] = -1
            total = total + v.reshape(ones)
        return total

    def transform(self, u: Grid) -> Grid:
        """Coefficients of u in the orthonormal eigenvectors, in the order of the eigenvalues."""
        for axis, q in enumerate(self.transforms):
            u = q.coefficients(u, axis)
        return u

    def inverse(self, coefficients: Grid) -> Grid:
        """The grid function with these coefficients."""
        u = coefficients
        for axis, q in enumerate(self.transforms):
            u = q.combination(u, axis)
        return u

    def mv(self, u: Grid) -> Grid:
        """A u, by differences."""
        total = jnp.zeros_like(u)
        for axis, (h, side) in enumerate(zip(self.spacing, self.boundary, strict=True)):
            total = total + _second_difference(u, axis, side) / h**2
        return total

    def solve(self, f: Grid, shift: ArrayLike = 0.0) -> Grid:
        """`(A + shift)^-1 f`. Modes with the eigenvalue 0 (a constant with zero flux or periodic
        conditions and no shift) are left out of f and of the solution."""

        def inverse(v: Grid) -> Grid:
            return jnp.where(v == 0, 0, 1 / jnp.where(v == 0, 1, v))

        return self.function(inverse, f, shift)

    def function(self, of: Callable[[Grid], Grid], f: Grid, shift: ArrayLike = 0.0) -> Grid:
        """`of(A + shift) f` for a function of the eigenvalues, for instance `jnp.sqrt`."""
        return self.inverse(of(self.eigenvalues + shift) * self.transform(f))

    def flat(self, shift: ArrayLike = 0.0) -> "FlatSolve":
        """`(A + shift)^-1` on vectors, as a preconditioner of the Krylov methods takes it."""
        return FlatSolve(self, jnp.asarray(shift))


class FlatSolve(eqx.Module):
    """`r -> (A + shift)^-1 r` on flat vectors; also differentiable and transposable."""

    laplacian: Laplacian
    shift: Float[Array, ""]

    def __call__(self, r: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.laplacian.solve(r.reshape(self.laplacian.shape), self.shift).reshape(-1)


class Folded(eqx.Module):
    """Orthonormal vectors of n entries, the first `n - n // 2` symmetric about the middle and the
    others antisymmetric, by their first halves (columns); the middle of an odd n is symmetric."""

    symmetric: Float[Array, "a a"]
    antisymmetric: Float[Array, "b b"]

    def coefficients(self, u: Grid, axis: int) -> Grid:
        """Products of the vectors with u along `axis`."""
        n, half = u.shape[axis], u.shape[axis] // 2
        first, last = _part(u, 0, half, axis), jnp.flip(_part(u, n - half, n, axis), axis)
        both = jnp.concatenate([first + last, _part(u, half, n - half, axis)], axis)
        products = (
            _times(self.symmetric.T, both, axis),
            _times(self.antisymmetric.T, first - last, axis),
        )
        return jnp.concatenate(products, axis)

    def combination(self, c: Grid, axis: int) -> Grid:
        """The sum of the vectors with the coefficients c along `axis`."""
        n, half = c.shape[axis], c.shape[axis] // 2
        even = _times(self.symmetric, _part(c, 0, n - half, axis), axis)
        odd = _times(self.antisymmetric, _part(c, n - half, n, axis), axis)
        first, middle = _part(even, 0, half, axis), _part(even, half, n - half, axis)
        return jnp.concatenate([first + odd, middle, jnp.flip(first - odd, axis)], axis)


def _part(u: Grid, start: int, stop: int, axis: int) -> Grid:
    return jax.lax.slice_in_dim(u, start, stop, axis=axis)


def _times(matrix: Float[Array, "n m"], u: Grid, axis: int) -> Grid:
    return jnp.moveaxis(jnp.tensordot(matrix, u, (1, axis)), 0, axis)


def _eigen(n: int, h: float, side: Boundary) -> tuple[Folded, Float[Array, " n"]]:
    """Eigenvectors and eigenvalues of the second difference of one axis."""
    j, half = np.arange(n)[:, None], n // 2
    if side == "dirichlet":
        angles = np.pi * (j + 1) * np.arange(1, n + 1)[None] / (n + 1)
        vectors, modes = (
            np.sqrt(2 / (n + 1)) * np.sin(angles),
            np.pi * np.arange(1, n + 1) / (n + 1),
        )
        even, odd = np.arange(0, n, 2), np.arange(1, n, 2)
    elif side == "neumann":
        vectors = np.sqrt(2 / n) * np.cos(np.pi * (j + 0.5) * np.arange(n)[None] / n)
        vectors[:, 0] /= np.sqrt(2)
        modes = np.pi * np.arange(n) / n
        even, odd = np.arange(0, n, 2), np.arange(1, n, 2)
    else:
        # Cosines and sines about the middle between two points.
        waves, sines = np.arange(n - half), np.arange(1, half + 1)
        turn = 2 * np.pi * (j + 0.5) / n
        vectors = np.sqrt(2 / n) * np.hstack(
            [np.cos(turn * waves[None]), np.sin(turn * sines[None])]
        )
        vectors[:, 0] /= np.sqrt(2)
        if n % 2 == 0:
            # The highest wave is a sine alone.
            vectors[:, -1] /= np.sqrt(2)
        modes = 2 * np.pi * np.concatenate([waves, sines]) / n
        even, odd = np.arange(n - half), np.arange(n - half, n)
    folded = Folded(jnp.asarray(vectors[: n - half, even]), jnp.asarray(vectors[:half, odd]))
    modes = np.concatenate([modes[even], modes[odd]])
    return folded, jnp.asarray((2 * np.sin(modes / 2) / h) ** 2)


def _second_difference(u: Grid, axis: int, side: Boundary) -> Grid:
    """`2 u_i - u_(i-1) - u_(i+1)` along one axis."""
    if side == "periodic":
        return 2 * u - jnp.roll(u, 1, axis) - jnp.roll(u, -1, axis)
    widths = [(0, 0)] * u.ndim
    widths[axis] = (1, 1)
    padded = jnp.pad(u, widths, mode="constant" if side == "dirichlet" else "edge")
    return -jnp.diff(padded, 2, axis)
