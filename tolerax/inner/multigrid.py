"""Geometric multigrid for diffusion on a regular grid: a preconditioner whose steps do not grow."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

Grid = Float[Array, "..."]
Faces = tuple[Grid, ...]


class Diffusion(eqx.Module):
    """`A u = -div(k grad u) + c u` on a regular grid with zero Dirichlet values, by fluxes.

    - `faces`: one array an axis, the coefficient k at the faces across that axis: shape of the grid
      with one more along the axis. `reaction`: c >= 0, a number or a grid function.
    - `spacing`: the distance of neighbours along every axis.

    >>> import jax.numpy as jnp
    >>> A = Diffusion.of(jnp.ones((9, 9)))
    >>> bool(jnp.allclose(A.mv(jnp.ones((7, 7)))[3, 3], 0.0))
    True
    """

    faces: Faces
    reaction: Grid
    spacing: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        coefficient: Grid,
        reaction: ArrayLike = 0.0,
        *,
        spacing: float | Sequence[float] | None = None,
    ) -> "Diffusion":
        """From k at the points of the grid *with* its boundary, shape `(n + 2, ...)`: the value of
        a face is the harmonic mean of its two points. `spacing` defaults to `1 / (n + 1)`."""
        k = jnp.asarray(coefficient)
        if k.ndim < 1 or min(k.shape) < 3:
            raise ValueError(
                f"coefficient has shape {k.shape}: give its values at all points of the grid, "
                "boundary included, at least 3 along every axis."
            )
        if spacing is None:
            spacing = [1 / (n - 1) for n in k.shape]
        steps = (spacing,) * k.ndim if isinstance(spacing, int | float) else tuple(spacing)
        if len(steps) != k.ndim or not all(h > 0 for h in steps):
            raise ValueError(f"spacing is {spacing}: give one positive number, or one an axis.")
        faces = []
        for axis in range(k.ndim):
            inner = tuple(slice(None) if i == axis else slice(1, -1) for i in range(k.ndim))
            line = jnp.moveaxis(k[inner], axis, 0)
            mean = 2 * line[1:] * line[:-1] / (line[1:] + line[:-1])
            faces.append(jnp.moveaxis(mean, 0, axis))
        shape = tuple(n - 2 for n in k.shape)
        c = jnp.broadcast_to(jnp.asarray(reaction, k.dtype), shape)
        return cls(tuple(faces), c, tuple(float(h) for h in steps))

    @property
    def shape(self) -> tuple[int, ...]:
        """Unknowns along every axis."""
        return self.reaction.shape

    def mv(self, u: Grid) -> Grid:
        """A u."""
        total = self.reaction * u
        for axis, (k, h) in enumerate(zip(self.faces, self.spacing, strict=True)):
            widths = [(1, 1) if i == axis else (0, 0) for i in range(u.ndim)]
            flux = k * jnp.diff(jnp.pad(u, widths), axis=axis)
            total = total - jnp.diff(flux, axis=axis) / h**2
        return total

    @property
    def diagonal(self) -> Grid:
        """The diagonal of A."""
        total = self.reaction
        for axis, (k, h) in enumerate(zip(self.faces, self.spacing, strict=True)):
            line = jnp.moveaxis(k, axis, 0)
            total = total + jnp.moveaxis(line[1:] + line[:-1], 0, axis) / h**2
        return total

    def coarser(self) -> "Diffusion":
        """The same operator on the grid of every other point: faces in series by the harmonic mean
        along their axis, in parallel by weighted means across."""
        faces = []
        for axis, k in enumerate(self.faces):
            line = jnp.moveaxis(k, axis, 0)
            line = 2 * line[::2] * line[1::2] / (line[::2] + line[1::2])
            k = jnp.moveaxis(line, 0, axis)
            for other in range(k.ndim):
                if other != axis:
                    k = _restrict_axis(k, other)
            faces.append(k)
        steps = tuple(2 * h for h in self.spacing)
        return Diffusion(tuple(faces), _restrict(self.reaction), steps)


class Multigrid(eqx.Module):
    """One symmetric V-cycle for [`Diffusion`][], as a preconditioner `r -> A^-1 r` approximately.

    Linear, symmetric and positive definite, so that CG and MINRES may use it. The coarsest grid is
    solved exactly.

    - `levels`: the operators from fine to coarse; make them with [`Multigrid.of`][].
    - `sweeps`: Chebyshev smoothing steps before and after each coarse correction.

    Source: Briggs, Henson, McCormick, *A Multigrid Tutorial*; Adams, Brezina, Hu, Tuminaro
    (*J. Comput. Phys.* 188, 2003) for the smoother.

    >>> import jax.numpy as jnp
    >>> A = Diffusion.of(1 + jnp.arange(17.0)[:, None] * jnp.ones((17, 17)))
    >>> b = jnp.ones(A.shape)
    >>> bool(jnp.linalg.norm(A.mv(Multigrid.of(A)(b)) - b) < 0.3 * jnp.linalg.norm(b))
    True
    """

    levels: tuple[Diffusion, ...]
    coarsest: Float[Array, "n n"]
    sweeps: int = eqx.field(static=True, default=2)

    @classmethod
    def of(cls, operator: Diffusion, *, sweeps: int = 2, coarsest: int = 7) -> "Multigrid":
        """Coarsen while every axis has an odd number of points and one has more than `coarsest`."""
        if sweeps < 1:
            raise ValueError(f"sweeps is {sweeps}: give at least 1.")
        levels = [operator]
        while all(n % 2 == 1 and n >= 3 for n in levels[-1].shape) and (
            max(levels[-1].shape) > coarsest
        ):
            levels.append(levels[-1].coarser())
        last = levels[-1]
        size = int(np.prod(last.shape))
        if size > 4096:
            raise ValueError(
                f"the grid {operator.shape} coarsens to {last.shape} only, too many points for a "
                "dense solve: take 2^k m - 1 points along every axis."
            )
        columns = jax.vmap(lambda e: last.mv(e.reshape(last.shape)).reshape(-1))
        dense = columns(jnp.eye(size, dtype=last.reaction.dtype))
        return cls(tuple(levels), jnp.linalg.inv(dense), sweeps)

    def __call__(self, r: Grid) -> Grid:
        """The cycle applied to a grid function, or to a flat vector."""
        shape = self.levels[0].shape
        return self._cycle(0, r.reshape(shape)).reshape(r.shape)

    def _cycle(self, level: int, r: Grid) -> Grid:
        if level == len(self.levels) - 1:
            u = self.coarsest @ r.reshape(-1)
            return u.reshape(r.shape)
        operator = self.levels[level]
        u = self._smooth(operator, jnp.zeros_like(r), r)
        rest = _restrict(r - operator.mv(u))
        u = u + _prolong(self._cycle(level + 1, rest))
        return self._smooth(operator, u, r)

    def _smooth(self, operator: Diffusion, u: Grid, r: Grid) -> Grid:
        """Chebyshev steps for the upper three quarters of the spectrum of D^-1 A, which ends at 2:
        off-diagonal entries sum up to at most the diagonal."""
        diagonal = operator.diagonal
        top, bottom = 2.0, 0.5
        centre, half = 0.5 * (top + bottom), 0.5 * (top - bottom)
        ratio = centre / half
        rho = 1 / ratio
        step = (r - operator.mv(u)) / diagonal / centre
        u = u + step
        for _ in range(self.sweeps - 1):
            new = 1 / (2 * ratio - rho)
            step = new * rho * step + 2 * new / half * (r - operator.mv(u)) / diagonal
            u, rho = u + step, new
        return u


def _restrict_axis(u: Grid, axis: int) -> Grid:
    """Full weighting (1/4, 1/2, 1/4) onto every other point."""
    line = jnp.moveaxis(u, axis, 0)
    return jnp.moveaxis(0.25 * (line[:-2:2] + 2 * line[1:-1:2] + line[2::2]), 0, axis)


def _restrict(u: Grid) -> Grid:
    for axis in range(u.ndim):
        u = _restrict_axis(u, axis)
    return u


def _prolong(u: Grid) -> Grid:
    """Linear interpolation, zero on the boundary: twice the transpose of `_restrict` an axis."""
    for axis in range(u.ndim):
        line = jnp.moveaxis(u, axis, 0)
        n = line.shape[0]
        fine = jnp.zeros((2 * n + 1, *line.shape[1:]), line.dtype)
        padded = jnp.pad(line, [(1, 1)] + [(0, 0)] * (line.ndim - 1))
        fine = fine.at[1::2].set(line).at[::2].set(0.5 * (padded[1:] + padded[:-1]))
        u = jnp.moveaxis(fine, 0, axis)
    return u
