"""What solvers that ask for values at many points share: flat ensembles, energies, probes."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.particles import normal
from tolerax.solvers._common import Box, lost_in
from tolerax.status import PointStatus, Status
from tolerax.validation import check_integer, is_concrete

Positions = Float[Array, "n d"]
PROBE_LADDER = 12.0  # halvings from the largest probe down to the smallest
LEAST_PROBES = 64  # few particles probe for several steps


class Ensemble(eqx.Module):
    """The state of a solver whose particles are meant together, as a sample of a density.

    `x` holds them flat, one a row; `ensemble`, `mean` and `covariance` say what they are.
    """

    x: eqx.AbstractVar[Positions]
    box: eqx.AbstractVar[Box]

    @property
    def ensemble(self) -> PyTree:
        """The particles: a pytree like x with a leading axis."""
        return jax.vmap(self.box.unravel)(self.x)

    @property
    def mean(self) -> PyTree:
        """Their mean, a pytree like x."""
        return self.box.unravel(jnp.mean(self.x, axis=0))

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """Their covariance, between the entries of the flat x."""
        return jnp.atleast_2d(jnp.cov(self.x.T))


class Population(Solver):
    """A solver with a number of particles."""

    particles: eqx.AbstractVar[int]

    def larger(self, factor: int) -> Solver:
        return dataclasses.replace(self, particles=factor * self.particles)


def first_ensemble(
    start: Start, box: Box, particles: int, spread: PyTree, ensemble: PyTree, key: PRNGKeyArray
) -> Positions:
    """The given particles, or ones that are normally distributed about the start."""
    x0, _ = ravel_pytree(start.x)
    if ensemble is None:
        like = jnp.zeros((particles, x0.size), x0.dtype)
        return x0[None] + scale_like(spread, start.x)[None] * normal(key, like)
    wanted = [(particles, *leaf.shape) for leaf in jax.tree.leaves(start.x)]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(ensemble)]
    if jax.tree.structure(ensemble) != jax.tree.structure(start.x) or shapes != wanted:
        raise ValueError(
            f"ensemble has the shapes {shapes}: it must be a pytree like x0 with a leading axis of "
            f"particles={particles}, so of shapes {wanted}."
        )
    x = flat(ensemble).astype(x0.dtype)
    x = eqx.error_if(x, ~jnp.isfinite(x), "ensemble has entries that are not finite.")
    outside = jnp.any((x < box.lower[None]) | (x > box.upper[None]))
    return eqx.error_if(x, outside, "ensemble has particles outside the bounds.")


def flat(points: PyTree) -> Positions:
    """A batch of points as rows."""
    return jax.vmap(lambda point: ravel_pytree(point)[0])(points)


def batch_query(
    x: Positions, box: Box, accuracy: Accuracy, derivatives: int = 0, sharding: Any = None
) -> Query:
    """A question for the values at all rows of x."""
    each = lambda t: jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])  # noqa: E731
    return Query(
        jax.vmap(box.unravel)(x),
        Accuracy(each(accuracy.state), each(accuracy.adjoint)),
        mask=jnp.ones(x.shape[0], bool),
        derivatives=derivatives,
        sharding=sharding,
    )


def energies(query: Query, evaluation: Evaluation, dtype: Any) -> Float[Array, " n"]:
    """Upper ends of the values, infinite where a point failed or was not evaluated."""
    value = (evaluation.value + evaluation.value_error).astype(dtype)
    ok = (evaluation.status != PointStatus.failed) & ~jnp.isnan(value)
    if query.mask is not None:
        ok = ok & query.mask
    return jnp.where(ok, value, jnp.inf)


def largest_error(query: Query, evaluation: Evaluation, least: Array) -> Float[Array, ""]:
    """The largest error of the values that were asked for, at least `least`."""
    error = evaluation.value_error.astype(least.dtype)
    asked = jnp.isfinite(error) if query.mask is None else jnp.isfinite(error) & query.mask
    return jnp.maximum(least, jnp.max(jnp.where(asked, error, 0)))


def scale_like(spread: PyTree, x: PyTree, name: str = "spread") -> Float[Array, " d"]:
    """A spread, given as a number or as a pytree like x, for every coordinate of the flat x."""
    if jax.tree.structure(spread) != jax.tree.structure(x):
        leaves = jax.tree.leaves(spread)
        if len(leaves) != 1 or jnp.ndim(leaves[0]):
            raise ValueError(f"{name} is {spread!r}: give a number or a pytree like x0.")
        spread = jax.tree.map(lambda leaf: leaves[0], x)
    full = lambda s, leaf: jnp.broadcast_to(jnp.asarray(s, leaf.dtype), leaf.shape)  # noqa: E731
    return ravel_pytree(jax.tree.map(full, spread, x))[0]


def probe_lengths(count: int, dtype: Any, before: Any) -> Float[Array, " n"]:
    """Lengths of probes relative to the scale: they halve from 1 down, over `LEAST_PROBES` probes
    or more, of which `before` have been made in earlier steps."""
    place = (before + jnp.arange(count)) / max(count, LEAST_PROBES)
    return (2.0 ** (-PROBE_LADDER * place)).astype(dtype)


def probes(
    key: PRNGKeyArray, about: Float[Array, " d"], scale: Float[Array, " d"], count: int, before: Any
) -> Positions:
    """Points around one, normally distributed, at all distances up to `scale`."""
    like = jnp.zeros((count, about.size), about.dtype)
    length = probe_lengths(count, about.dtype, before)
    return about[None] + length[:, None] * scale[None] * normal(key, like)


def probed(about: Float[Array, " d"], scale: Float[Array, " d"]) -> Any:
    """The status of a run whose probes found nothing lower: those that rounding puts back on the
    point say nothing."""
    return Status.where(lost_in(about, scale), Status.stalled, Status.consensus)


def check_count(owner: Any, name: str, least: int = 2) -> None:
    """Raise for a field that is no integer of at least `least`."""
    check_integer(name, getattr(owner, name), least)


def refuse_bounds(start: Start, **maps: Any) -> None:
    """Raise where the problem has bounds and points are put elsewhere by a map."""
    for name, given in maps.items():
        if given is not None and start.bounds is not None:
            raise ValueError(f"{name} is given and the problem has bounds: choose one of both.")


def check_spread(spread: PyTree, name: str = "spread") -> None:
    """Raise where a spread has entries that are not positive and finite."""
    for leaf in jax.tree.leaves(spread):
        if is_concrete(leaf):
            entries = np.asarray(leaf)
            if not (np.isfinite(entries).all() and (entries > 0).all()):
                raise ValueError(f"{name} is {spread!r}: its entries must be positive and finite.")


def any_finite(energy: Float[Array, " n"]) -> Bool[Array, ""]:
    """Whether at least one energy is a number (or minus infinity)."""
    return jnp.any(energy < jnp.inf)


def tempered(
    energy: Float[Array, " n"], share: Any, halvings: int = 40
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """The inverse temperature beta for which weights `exp(-beta E)` have the effective sample size
    `(sum w)^2 / sum w^2` of a `share` of the finite energies, and the weights, which sum to 1."""
    least = jnp.min(energy)
    finite = energy < jnp.inf
    above = jnp.where(finite, energy - jnp.where(jnp.isfinite(least), least, 0), jnp.inf)
    unit = jnp.nanquantile(jnp.where(finite, above, jnp.nan), 0.5, method="lower")
    unit = jnp.where(unit > 0, unit, 1)

    def weights(beta: Array) -> Array:
        return jnp.where(above > 0, jnp.exp(-beta * above), 1) * finite

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        w = weights(jnp.exp(middle) / unit)
        many = jnp.sum(w) ** 2 / jnp.sum(w * w) > share * jnp.sum(finite)
        return jnp.where(many, middle, ends[0]), jnp.where(many, ends[1], middle)

    ends = (jnp.full((), -12.0, energy.dtype), jnp.full((), 24.0, energy.dtype))
    low, high = jax.lax.fori_loop(0, halvings, halve, ends)
    beta = jnp.exp(0.5 * (low + high)) / unit
    return beta, normalized(weights(beta))


def boltzmann(energy: Float[Array, " n"], beta: Any) -> Float[Array, " n"]:
    """Weights `exp(-beta E)`, which sum to 1."""
    least = jnp.min(energy)
    above = energy - jnp.where(jnp.isfinite(least), least, 0)
    return normalized(jnp.where(above > 0, jnp.exp(-beta * above), 1) * (energy < jnp.inf))


def normalized(w: Float[Array, " n"]) -> Float[Array, " n"]:
    """Weights divided by their sum; all 0 where there are none."""
    total = jnp.sum(w)
    return w / jnp.where(total > 0, total, 1)
