"""The best point of a search under constraints."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.solvers._common import select


class Best(eqx.Module):
    """The best point of all: the lowest of those whose violation is at most `within`, or the one
    that violates least."""

    x: Float[Array, " n"]
    value: Float[Array, ""]
    violation: Float[Array, ""]
    within: Float[Array, ""]

    @classmethod
    def unknown(cls, x: Float[Array, " n"], within: ArrayLike) -> "Best":
        """A point of which nothing is known: any other is better."""
        inf = jnp.array(jnp.inf, x.dtype)
        return cls(x, inf, inf, jnp.asarray(within, x.dtype))

    @property
    def feasible(self) -> Bool[Array, ""]:
        """Whether the constraints hold there."""
        return self.violation <= self.within

    @property
    def height(self) -> Float[Array, ""]:
        """What a better point lowers: the value, or the violation while nothing is feasible."""
        return jnp.where(self.feasible, self.value, self.violation)

    def merit(self, penalty: Float[Array, ""]) -> Float[Array, ""]:
        """The value with the penalty of its violation."""
        return self.value + jnp.where(self.violation > 0, penalty * self.violation, 0)

    def among(
        self, points: Float[Array, "k n"], value: Float[Array, " k"], violation: Float[Array, " k"]
    ) -> "Best":
        """The best of this point and others, of which those that failed have an infinite value."""
        violation = jnp.where(value < jnp.inf, violation, jnp.inf)
        missed = jnp.where(violation <= self.within, 0, violation)
        i = jnp.argmin(jnp.where(missed == jnp.min(missed), value, jnp.inf))
        new = Best(points[i], value[i], violation[i], self.within)
        before = jnp.where(self.feasible, 0, self.violation)
        lower = (missed[i] == before) & (new.value < self.value)
        return select((missed[i] < before) | lower, new, self)
