"""Kinks, told from smooth minima by how second differences fall with the length of steps.

Over the 2n points of a random orthogonal basis and its negative the second differences of a smooth
function sum to the trace of its Hessian times the length squared, whatever the basis, and to less
where that is 0, as for `x^4`. Across a kink they fall like the length itself.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tolerax.solvers._common import select

#: Between 1, of kinks, and 2, of quadratics.
POWER = 1.5


def first_size(
    values: Float[Array, " q"], rows: Float[Array, "q p"], before: Float[Array, " k"], first: Array
) -> Float[Array, " k"]:
    """The size of the values at the start, when they come, as a guess of that of their terms."""
    size = jnp.abs(jnp.append(values[0], rows[0]))
    return jnp.where(first & jnp.isfinite(size), size, before)


class Bend(eqx.Module):
    """Sums of second differences of the objective and of every constraint, over steps of a length;
    infinite as long as there are none."""

    length: Float[Array, ""]
    sums: Float[Array, " k"]
    rounding: Float[Array, " k"]  # what of them may be rounding and errors of values

    @classmethod
    def unknown(cls, values: Float[Array, " k"]) -> "Bend":
        """Before there are any."""
        infinite = jnp.full_like(values, jnp.inf)
        return cls(infinite[0], infinite, infinite)

    @classmethod
    def of(
        cls,
        center: Float[Array, " n"],
        middle: Float[Array, " k"],
        points: Float[Array, "q n"],
        values: Float[Array, "q k"],
        length: Float[Array, ""],
        size: Float[Array, " k"],
        error: Float[Array, ""],
    ) -> "Bend":
        """From the values in the `middle`, at the center, and at points of which the second half
        is opposite to the first. Pairs are left out where a bound has moved one or a value is
        missing; where none is left nothing is known.

        - `size`: of the terms that values are sums of, which may be larger than the values.
        - `error`: of the values of the objective.
        """
        n = center.size
        away = jnp.linalg.norm(points - center[None], axis=1)
        slack = jnp.sqrt(jnp.finfo(away.dtype).eps)
        fine = (jnp.abs(away - length) <= slack * length) & jnp.all(jnp.isfinite(values), axis=1)
        pair = (fine[:n] & fine[n:])[:, None]
        values = jnp.where(fine[:, None], values, 0)
        each = jnp.where(pair, values[:n] + values[n:] - 2 * middle[None], 0)
        # Four values a pair, sums of terms of this size, at points that are rounded too.
        size = jnp.maximum(size, jnp.max(jnp.abs(values), axis=0))
        slope = jnp.abs(values[:n] - values[n:]) / length * jnp.linalg.norm(center)
        terms = jnp.sum(jnp.where(pair, size[None] + slope, 0), axis=0)
        errors = jnp.where(jnp.arange(middle.size) == 0, 4 * n * error, 0)
        rounding = 4 * jnp.finfo(terms.dtype).eps * terms + errors
        found = cls(length, jnp.sum(each, axis=0), rounding)
        return select(jnp.any(pair), found, cls.unknown(middle))

    def kinked(self, longer: "Bend") -> Bool[Array, ""]:
        """Whether these, beside those over longer steps, fall so slowly that there is a kink."""
        known = jnp.isfinite(self.length) & jnp.isfinite(longer.length)
        share = (self.length / longer.length) ** POWER
        most = jnp.abs(longer.sums) * share
        slow = jnp.abs(self.sums) > most + self.rounding + longer.rounding * share
        return known & jnp.any(slow)
