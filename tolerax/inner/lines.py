"""Diffusion on a grid, solved one axis after the other: a preconditioner of a few sweeps."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Grid = Float[Array, "*batch rows columns"]
Both = Float[Array, "2 *batch rows columns"]
DOWN, RIGHT = -2, -1


class AlternatingLines(eqx.Module):
    """An approximate inverse of `A = I + A_1 + A_2`, where `A_1` couples neighbours in a column of
    a grid and `A_2` those in a row, with coefficients that may jump from pixel to pixel.

    With `s + A_1 = L L'`, which is tridiagonal like `s + A_2`, the matrix `L (s + A_2) L' / s` is
    symmetric, positive definite and inverted by sweeps along the lines. Where both parts commute it
    has the eigenvalues `(s + a)(s + b) / s` for `1 + a + b` of A: for the s of below they are
    between about 1 and s times as large, where A itself has the condition 4 s^2. L looks at every
    column from its top; the mean of the inverses of two such matrices, the other of which begins at
    the bottom, prefers neither end.

    - `of(down, right)`: the nonnegative coefficients between neighbours: `down` of shape `(...,
      rows - 1, columns)`, `right` of shape `(..., rows, columns - 1)`, with leading axes for
      independent grids. Nothing flows across the boundary.
    - `mv(r)`: the approximate inverse times a grid function, eight sweeps in all.

    Source: the splitting is that of Peaceman and Rachford (*J. SIAM* 3, 1955); the symmetric form
    is our own.

    >>> import jax.numpy as jnp
    >>> lines = AlternatingLines.of(jnp.ones((3, 5)), jnp.zeros((4, 4)))
    >>> lines.mv(jnp.ones((4, 5))).shape
    (4, 5)
    """

    shift: Float[Array, ""]
    first: tuple[Both, Both]
    second: tuple[Both, Both]

    @classmethod
    def of(
        cls,
        down: Float[Array, "*batch _ columns"],
        right: Float[Array, "*batch rows _"],
    ) -> "AlternatingLines":
        # 4 max is the norm that each part can have; equal ratios at both ends of the spectrum.
        most = 4 * jnp.maximum(jnp.max(down, initial=0), jnp.max(right, initial=0))
        shift = 0.5 * (1 + jnp.sqrt(1 + 2 * most))
        both = lambda c: jnp.stack([c, jnp.flip(c, DOWN)])  # noqa: E731
        return cls(shift, _factor(both(down), shift, DOWN), _factor(both(right), shift, RIGHT))

    def mv(self, r: Grid) -> Grid:
        """The approximate inverse times r."""
        u = jnp.stack([r, jnp.flip(r, DOWN)])
        (pivots, ratios), (last_pivots, last_ratios) = self.first, self.second
        root = jnp.sqrt(pivots)
        u = _sweep(u, ratios, DOWN) / root
        u = _sweep(u, last_ratios, RIGHT) / last_pivots
        u = _sweep(u, last_ratios, RIGHT, back=True)
        u = _sweep(u / root, ratios, DOWN, back=True)
        return 0.5 * self.shift * (u[0] + jnp.flip(u[1], DOWN))


def _factor(
    coefficient: Float[Array, "2 *batch _ _"], shift: Float[Array, ""], axis: int
) -> tuple[Both, Both]:
    """Pivots D and ratios M of `s + A = (1 - M) D (1 - M)'` for one axis, M below the diagonal; a
    ratio belongs to the line that it adds the line before to."""
    c = jnp.moveaxis(coefficient, axis, 0)
    none = jnp.zeros_like(c[:1]) if c.shape[0] else jnp.zeros((1, *c.shape[1:]), c.dtype)
    before, after = jnp.concatenate([none, c]), jnp.concatenate([c, none])

    def line(pivot: Array, parts: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        before, after = parts
        ratio = before / pivot
        pivot = shift + before + after - ratio * before
        return pivot, (pivot, ratio)

    _, (pivots, ratios) = jax.lax.scan(line, jnp.ones_like(before[0]), (before, after))
    return jnp.moveaxis(pivots, 0, axis), jnp.moveaxis(ratios, 0, axis)


def _sweep(r: Both, ratios: Both, axis: int, back: bool = False) -> Both:
    """`(1 - M)^-1 r` along an axis, or with the transpose of M."""
    r, m = jnp.moveaxis(r, axis, 0), jnp.moveaxis(ratios, axis, 0)
    if back:
        m = jnp.concatenate([m[1:], jnp.zeros_like(m[:1])])

    def line(u: Array, parts: tuple[Array, Array]) -> tuple[Array, Array]:
        r, m = parts
        u = r + m * u
        return u, u

    _, u = jax.lax.scan(line, jnp.zeros_like(r[0]), (r, m), reverse=back)
    return jnp.moveaxis(u, 0, axis)
