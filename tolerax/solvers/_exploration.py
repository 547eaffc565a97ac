"""Looking elsewhere: generations of CMA-ES of which a quadratic, fitted to the last points, chooses
whom to evaluate. Points are flat and in units of the scale of each variable."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tolerax.inner.evolution import (
    Evolution,
    agreement,
    feature_count,
    features,
    fitted,
    quadratic_of,
)
from tolerax.inner.trust_region import in_ball
from tolerax.solvers._common import select
from tolerax.solvers._model_steps import Sides

BELIEVED = 0.85  # the rank correlation of fit and values from which the fit ranks the rest
COMPARED = 15  # on so many of the last points
COLLAPSED = 1e-5  # standard deviations, in units of the first, at which a distribution has ended


class Exploration(eqx.Module):
    """The distribution, its last sample with the values known of it, and the last points."""

    evolution: Evolution
    sample: Float[Array, "size n"]
    values: Float[Array, " size"]
    known: Bool[Array, " size"]
    quota: Int[Array, ""]
    points: Float[Array, "last n"]
    energies: Float[Array, " last"]
    count: Int[Array, ""]
    fit: Float[Array, " k"]

    @property
    def seen(self) -> Bool[Array, " last"]:
        """Which of the last points have a value."""
        return (jnp.arange(self.energies.size) < self.count) & jnp.isfinite(self.energies)


def empty(center: Float[Array, " n"], size: int) -> Exploration:
    """Nothing seen yet."""
    n, dtype = center.size, center.dtype
    last = 3 * feature_count(n)
    return Exploration(
        evolution=Evolution.of(center, jnp.ones((), dtype)),
        sample=jnp.zeros((size, n), dtype),
        values=jnp.full(size, jnp.inf, dtype),
        known=jnp.zeros(size, bool),
        quota=jnp.array(0),
        points=jnp.zeros((last, n), dtype),
        energies=jnp.full(last, jnp.inf, dtype),
        count=jnp.array(0),
        fit=jnp.zeros(feature_count(n), dtype),
    )


def remembered(
    this: Exploration,
    points: Float[Array, "k n"],
    energies: Float[Array, " k"],
    which: Bool[Array, " k"],
) -> Exploration:
    """With some more points, in place of the oldest."""
    last = this.energies.size
    rank = jnp.cumsum(which) - 1
    slot = jnp.where(which, (this.count + rank) % last, last)
    return dataclasses.replace(
        this,
        points=this.points.at[slot].set(points, mode="drop"),
        energies=this.energies.at[slot].set(energies, mode="drop"),
        count=this.count + jnp.sum(which),
    )


def _fit(this: Exploration) -> Float[Array, " k"]:
    return fitted(this.evolution.whitened(this.points), this.energies, this.seen)


def drawn(this: Exploration, key: PRNGKeyArray, sides: Sides) -> Exploration:
    """With the sample of a new generation; its first member is where the fit is least."""
    size, n = this.sample.shape
    sample = this.evolution.sample(key, size)
    fit = _fit(this)
    g, H = quadratic_of(fit, n)
    least = this.evolution.coloured(in_ball(g, H, jnp.sqrt(jnp.asarray(n, g.dtype)))[None])[0]
    sample = sample.at[0].set(jnp.where(this.count > 2 * n + 2, least, sample[0]))
    return dataclasses.replace(
        this,
        sample=jnp.clip(sample, sides.low[None], sides.high[None]),
        values=jnp.full_like(this.values, jnp.inf),
        known=jnp.zeros_like(this.known),
        quota=jnp.array(2),
        fit=fit,
    )


def wanted(this: Exploration) -> tuple[Float[Array, "size n"], Int[Array, " size"], Array]:
    """Whom to evaluate next: members by their promise, their numbers, and how many of them."""
    promise = features(this.evolution.whitened(this.sample)) @ this.fit
    order = jnp.argsort(jnp.where(this.known, jnp.inf, promise))
    count = jnp.minimum(this.quota, this.known.size) - jnp.sum(this.known)
    return this.sample[order], order, jnp.maximum(count, 1)


def answered(
    this: Exploration, members: Int[Array, " size"], energies: Float[Array, " size"], count: Array
) -> tuple[Exploration, Bool[Array, ""]]:
    """With the values of the first `count` of the members that were wanted; and whether they are
    enough to rank the others."""
    size, n = this.sample.shape
    member = jnp.where(jnp.arange(size) < count, members, size)
    known = this.known.at[member].set(True, mode="drop")
    values = this.values.at[member].set(energies, mode="drop")
    this = dataclasses.replace(this, known=known, values=values)
    fit = _fit(this)
    newest = (this.count - 1 - jnp.arange(COMPARED)) % this.energies.size
    found = this.energies[newest]
    told = (jnp.arange(COMPARED) < this.count) & jnp.isfinite(found)
    said = features(this.evolution.whitened(this.points[newest])) @ fit
    believed = (agreement(said, found, told) >= BELIEVED) & (this.count > n + 2)
    enough = believed | jnp.all(known)
    quota = jnp.where(believed, this.quota, jnp.ceil(1.5 * this.quota).astype(this.quota.dtype))
    return dataclasses.replace(this, fit=fit, quota=quota), enough


def evolved(this: Exploration) -> Exploration:
    """After a generation whose order is known or believed."""
    promise = features(this.evolution.whitened(this.sample)) @ this.fit
    failed = this.known & ~jnp.isfinite(this.values)
    values = jnp.where(jnp.all(this.known), this.values, jnp.where(failed, jnp.inf, promise))
    return dataclasses.replace(this, evolution=this.evolution.updated(this.sample, values))


def centred(this: Exploration, center: Float[Array, " n"]) -> Exploration:
    """Moved there, if it has not begun."""
    now = this.evolution
    mean = jnp.where(now.generation == 0, center, now.mean)
    return dataclasses.replace(this, evolution=dataclasses.replace(now, mean=mean))


def restarted(
    this: Exploration, key: PRNGKeyArray, center: Float[Array, " n"], sides: Sides, now: Array
) -> Exploration:
    """Begun anew at a random point: anywhere within bounds, or around the center where there are
    none."""
    where, around = jax.random.split(key)
    low, high = sides
    bounded = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(bounded, low, 0), jnp.where(bounded, high, 0)
    anywhere = low + (high - low) * jax.random.uniform(where, center.shape, center.dtype)
    near = center + 3 * jax.random.normal(around, center.shape, center.dtype)
    mean = jnp.clip(jnp.where(bounded, anywhere, near), sides.low, sides.high)
    fresh = Evolution.of(mean, jnp.ones((), center.dtype))
    return dataclasses.replace(this, evolution=select(now, fresh, this.evolution))


__all__ = [
    "COLLAPSED",
    "Exploration",
    "answered",
    "centred",
    "drawn",
    "empty",
    "evolved",
    "remembered",
    "restarted",
    "wanted",
]
