"""Jacobians in lanes: one array a lane, or blocks of experts that are tied together at faces."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]
Square = Float[Array, "k n n"]


class Blocks(eqx.Module):
    """The Jacobian of experts whose unknowns are put together to one lane: each has rows of its
    own, and those of a face depend on the difference of the two beside it.

    - `own`: rows of each of E experts in its own s unknowns; n = E s.
    - `faces`: rows of each of F faces in `w_left - w_right`. `pairs`: left and right.

    Every array has the axis of lanes in front (which `jax.vmap` puts there).
    """

    own: Float[Array, "*k experts m s"]
    faces: Float[Array, "*k faces f s"]
    pairs: tuple[tuple[int, int], ...] = eqx.field(static=True)

    def _sides(self) -> tuple[Array, Array]:
        sides = jnp.asarray(self.pairs, int).reshape(-1, 2)
        return sides[:, 0], sides[:, 1]

    def _experts(self, w: Rows) -> Float[Array, "k experts s"]:
        return w.reshape(w.shape[0], *self.own.shape[1::2])

    def gram(self) -> Square:
        """J'J."""
        k, experts, _, s = self.own.shape
        left, right = self._sides()
        every = jnp.arange(experts)
        G = jnp.zeros((k, experts, experts, s, s), self.own.dtype)
        G = G.at[:, every, every].set(jnp.einsum("kemi,kemj->keij", self.own, self.own))
        face = jnp.einsum("kpfi,kpfj->kpij", self.faces, self.faces)
        for one, other, sign in ((left, left, 1), (right, right, 1), (left, right, -1)):
            G = G.at[:, one, other].add(sign * face)
        G = G.at[:, right, left].add(-face)
        return jnp.swapaxes(G, 2, 3).reshape(k, experts * s, experts * s)

    def times(self, w: Rows) -> Float[Array, "k m"]:
        """J w: rows of experts, then those of faces."""
        parts = self._experts(w)
        left, right = self._sides()
        own = jnp.einsum("kems,kes->kem", self.own, parts)
        faces = jnp.einsum("kpfs,kps->kpf", self.faces, parts[:, left] - parts[:, right])
        return jnp.concatenate([own.reshape(len(w), -1), faces.reshape(len(w), -1)], axis=1)

    def transposed(self, r: Float[Array, "k m"]) -> Rows:
        """J' r."""
        k, experts, m, _ = self.own.shape
        left, right = self._sides()
        own = r[:, : experts * m].reshape(k, experts, m)
        faces = r[:, experts * m :].reshape(self.faces.shape[:3])
        back = jnp.einsum("kpfs,kpf->kps", self.faces, faces)
        total = jnp.einsum("kems,kem->kes", self.own, own)
        total = total.at[:, left].add(back).at[:, right].add(-back)
        return total.reshape(k, -1)

    def dense(self) -> Float[Array, "k m n"]:
        """The matrix."""
        n = self.own.shape[1] * self.own.shape[3]
        units = jnp.broadcast_to(jnp.eye(n, dtype=self.own.dtype)[:, None], (n, len(self.own), n))
        return jnp.moveaxis(jax.vmap(self.times)(units), 0, 2)


Jacobian = Float[Array, "k m n"] | Blocks


def gram(J: Jacobian) -> Square:
    """J'J."""
    return J.gram() if isinstance(J, Blocks) else jnp.einsum("kmi,kmj->kij", J, J)


def times(J: Jacobian, w: Rows) -> Float[Array, "k m"]:
    """J w."""
    return J.times(w) if isinstance(J, Blocks) else jnp.einsum("kmi,ki->km", J, w)


def transposed(J: Jacobian, r: Float[Array, "k m"]) -> Rows:
    """J' r."""
    return J.transposed(r) if isinstance(J, Blocks) else jnp.einsum("kmi,km->ki", J, r)


def dense(J: Jacobian) -> Float[Array, "k m n"]:
    """The matrix."""
    return J.dense() if isinstance(J, Blocks) else J


def all_finite(J: Jacobian) -> Bool[Array, " k"]:
    """In which lanes every entry is."""
    parts = [jnp.all(jnp.isfinite(a).reshape(len(a), -1), axis=1) for a in jax.tree.leaves(J)]
    return jnp.all(jnp.stack(parts), axis=0)


def only(lanes: Bool[Array, " k"], J: Jacobian) -> Jacobian:
    """J, and 0 in the other lanes."""
    return jax.tree.map(lambda a: jnp.where(lanes.reshape(-1, *[1] * (a.ndim - 1)), a, 0), J)
