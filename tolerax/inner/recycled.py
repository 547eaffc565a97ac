"""A preconditioner that learns from the conjugate gradients it served, and stays a certificate.

For a symmetric A with a diagonal lower bound D the matrix

    P = D + L L'        L of low rank, L L' close to A - D on its range

has `P <= top D <= top A`, with `top` the largest eigenvalue of `D^-1 P`. So 1 / top is a floor
under the spectrum of `P^-1 A` *whatever* L is: Gauss-Radau bounds stay rigorous when L was learned
from another matrix, as those of earlier Newton steps and of earlier hyperparameters are. The floor
is low, though, and the products of the solve itself give better bounds (`dual_norm_given`). They
are looser than with D alone still: fewer products are paid for with that.

L is updated as in block BFGS, from directions p of a solve and their products A p: on the new
directions it becomes exact, elsewhere it stays. Morales and Nocedal (*SIAM Journal on Optimization*
10, 2000) precondition by L-BFGS pairs of earlier solves; the form on `A - D` is ours.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class Recycled(eqx.Module):
    """P = D + L L' in a form that is cheap to invert: `L' D^-1 L` is diagonal.

    - `diagonal`: D. `factor`: L, shape `(n, rank)`, columns in falling order of their `weights`,
      the eigenvalues of `L' D^-1 L`; 0 where a column is not used.
    - `pairs`: how many directions of a solve to learn from.

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 100.0]))
    >>> blank = Recycled.of(jnp.ones(3), jnp.zeros((3, 2)), pairs=1)
    >>> e = jnp.eye(3)[2:]
    >>> blank.learned(e, e @ A).solve(jnp.ones(3)).round(6)
    Array([1.  , 1.  , 0.01], dtype=float64)
    """

    diagonal: Vector
    factor: Float[Array, "n rank"]
    weights: Float[Array, " rank"]
    pairs: int = eqx.field(static=True)

    @classmethod
    def of(cls, diagonal: Vector, factor: Float[Array, "n columns"], *, pairs: int, rank: int = 0):
        """P for any factor, which keeps its `rank` heaviest columns (0: all)."""
        rank = rank or factor.shape[1]
        gram = factor.T @ (factor / diagonal[:, None])
        known = jnp.all(jnp.isfinite(gram))
        values, vectors = jnp.linalg.eigh(jnp.where(known, gram, 0))
        values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
        # What adds little to D helps little, and far below the heaviest columns is only rounding.
        small = jnp.sqrt(jnp.finfo(diagonal.dtype).eps)
        used = known & (values > jnp.maximum(0.05, small * values[0]))
        # Heavier columns than this would put the floor below rounding. Any factor will do.
        capped = jnp.minimum(values, 1 / (64 * small))
        factor = jnp.where(known, factor, 0) @ vectors
        factor = factor * jnp.where(used, jnp.sqrt(capped / jnp.where(used, values, 1)), 0)[None]
        return cls(diagonal, factor, jnp.where(used, capped, 0), pairs)

    @property
    def floor(self) -> Scalar:
        """A lower bound on the eigenvalues of `P^-1 A` for every A >= D: 1 / top, less rounding."""
        # Columns of D^-1/2 L are orthogonal up to eps times the ratio of their weights.
        slack = 16 * jnp.sqrt(jnp.finfo(self.diagonal.dtype).eps)
        top = 1 + self.weights[0]
        return jnp.where(self.weights[0] > 0, 1 / top - slack, 1)

    def solve(self, r: Vector) -> Vector:
        """`P^-1 r`, by the formula of Sherman, Morrison and Woodbury."""
        z = r / self.diagonal
        return z - (self.factor @ ((self.factor.T @ z) / (1 + self.weights))) / self.diagonal

    def learned(self, p: Float[Array, "pairs n"], ap: Float[Array, "pairs n"]) -> "Recycled":
        """With `P p = A p` for these directions, and the least of the old weights forgotten.

        Rows of zeros are left out.
        """
        curvature = jnp.sum(p * ap, axis=1)
        good = (curvature > 0) & jnp.isfinite(curvature)
        scale = jnp.where(good, 1 / jnp.sqrt(jnp.where(good, curvature, 1)), 0)[:, None]
        p, k = jnp.where(good[:, None], p, 0) * scale, jnp.where(good[:, None], ap, 0) * scale
        k = k - p * self.diagonal[None]  # (A - D) p
        inner = p @ k.T
        values, vectors = jnp.linalg.eigh(0.5 * (inner + inner.T))
        # Directions where A is hardly more than D need no place.
        wanted = values > 0.05
        turn = vectors * jnp.where(wanted, 1 / jnp.sqrt(jnp.where(wanted, values, 1)), 0)[None]
        fresh = k.T @ turn
        # What the old factor says about these directions goes; all of it where it says something.
        seen = self.factor.T @ (p.T @ turn)
        weight = seen.T @ seen + 0.03 * jnp.eye(len(p), dtype=p.dtype)
        old = self.factor - (self.factor @ seen) @ jnp.linalg.solve(weight, seen.T)
        both = jnp.concatenate([fresh, old], axis=1)
        rank = self.factor.shape[1]
        return Recycled.of(self.diagonal, both, pairs=self.pairs, rank=rank)


def blank_factor(y: Vector, rank: int) -> Float[Array, "n rank"]:
    """The factor that has learned nothing."""
    return jnp.zeros((y.size, min(rank, y.size)), y.dtype)
