"""Residuals of several experts put together to one lane, tied where their regions meet."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tolerax.inner.residuals import Structured
from tolerax.inner.rows import Blocks

Vector = Float[Array, " n"]


class Tied(eqx.Module):
    """Residuals of a lane that consists of experts: those of every expert, one after the other, and
    for each face the jump `faces (w_left - w_right)` there.

    The data of a lane are a pair: those of the residuals of the experts, with a leading axis of
    experts on every leaf, and the rows of the faces, shape `(F, f, s)`.
    """

    residuals: Structured
    pairs: tuple[tuple[int, int], ...] = eqx.field(static=True)
    experts: int = eqx.field(static=True)

    def _jumps(self, parts: Float[Array, "experts s"], faces: Array) -> Float[Array, " jumps"]:
        sides = jnp.asarray(self.pairs, int).reshape(-1, 2)
        apart = parts[sides[:, 0]] - parts[sides[:, 1]]
        return jnp.einsum("pfs,ps->pf", faces, apart).ravel()

    def __call__(self, w: Vector, data: PyTree) -> Float[Array, " m"]:
        own, faces = data
        parts = w.reshape(self.experts, -1)
        rows = jax.vmap(self.residuals)(parts, own)
        return jnp.concatenate([rows.ravel(), self._jumps(parts, faces)])

    def with_jacobian(self, w: Vector, data: PyTree) -> tuple[Float[Array, " m"], Blocks]:
        """Residuals, and their Jacobian in blocks."""
        own, faces = data
        parts = w.reshape(self.experts, -1)
        rows, J = jax.vmap(self.residuals.with_jacobian)(parts, own)
        return jnp.concatenate([rows.ravel(), self._jumps(parts, faces)]), Blocks(
            J, faces, self.pairs
        )

    def curvature(self, w: Vector, data: PyTree, r: Float[Array, " m"]) -> Float[Array, "n n"]:
        """`sum_i r_i r_i''(w)`; jumps have none."""
        own, faces = data
        parts = w.reshape(self.experts, -1)
        rows = r[: r.size - faces.shape[0] * faces.shape[1]].reshape(self.experts, -1)
        S = jax.vmap(self.residuals.curvature)(parts, own, rows)
        every = jnp.arange(self.experts)
        s = parts.shape[1]
        G = jnp.zeros((self.experts, self.experts, s, s), w.dtype).at[every, every].set(S)
        return jnp.swapaxes(G, 1, 2).reshape(w.size, w.size)
