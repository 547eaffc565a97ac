"""Points far from all that were evaluated: the covering step of direct search."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from tolerax.validation import is_concrete

BLOCK = 64  # evaluated points whose distances to all candidates are held at once


class Cover(NamedTuple):
    """Where to evaluate, and how far that is, in units of `radius`, from every point evaluated and
    from those before it in the batch. The first distance is how well the region was covered."""

    points: Float[Array, "count n"]
    distance: Float[Array, " count"]


def farthest_points(
    key: PRNGKeyArray,
    center: Float[Array, " n"],
    radius: Float[ArrayLike, "..."],
    evaluated: Float[Array, "m n"],
    *,
    mask: Bool[Array, " m"] | None = None,
    lower: Float[ArrayLike, "..."] = -jnp.inf,
    upper: Float[ArrayLike, "..."] = jnp.inf,
    count: int = 1,
    candidates: int = 512,
    refinements: int = 8,
) -> Cover:
    """Points of the box `center +- radius`, within bounds, that are far from all evaluated points:
    each the farthest, as far as candidates tell, from those and from the ones before it.

    - `radius`: half the side of the box, a number or one for each coordinate. Distances are
      Euclidean after division by it, so that coordinates may have different units.
    - `evaluated`: all points evaluated so far, in the box or not; `mask`: which rows count.
    - `lower`, `upper`: bounds, numbers or one for each coordinate; `center` must be within them.
    - `count`: how many points are wanted. `candidates`: among how many quasi-random points (shifted
      at random by `key`) each is looked for; the best one then takes `refinements` steps away from
      its nearest neighbour.

    The distance is at least the largest possible one minus the distance from where that is to the
    nearest candidate, which tends to 0 as candidates**(-1/n). So for n above about 10 no number of
    candidates finds the true farthest point, and no number of evaluations covers the box.

    Source: the covering oracle of Audet, Bouchet, Bourdin (arXiv 2401.07097); the greedy choice of
    several points is Gonzalez' (*Theoretical Computer Science* 38, 1985), which needs at most twice
    the radius of the best cover by as many points; the candidates are Roberts' sequence (2018),
    multiples of powers of the root of `p**(n+1) = p + 1`.

    >>> import jax, jax.numpy as jnp
    >>> seen = jnp.array([[0.0, 0.0]])
    >>> cover = farthest_points(jax.random.key(0), seen[0], 1.0, seen, count=4)
    >>> bool(jnp.all(jnp.abs(cover.points) > 0.8)), bool(cover.distance[0] > 1.3)  # the corners
    (True, True)
    """
    if count < 1 or candidates < 1:
        raise ValueError(f"count is {count}, candidates is {candidates}: give at least 1 of each.")
    if is_concrete(radius) and not np.all(np.asarray(radius) > 0):
        raise ValueError(f"radius is {radius}: give positive numbers.")
    n, dtype = center.shape[0], center.dtype
    vector = lambda t: jnp.broadcast_to(jnp.asarray(t, dtype), (n,))  # noqa: E731
    # From here in units of the radius, around the center.
    scale = vector(radius)
    low = jnp.maximum((vector(lower) - center) / scale, -1)
    high = jnp.minimum((vector(upper) - center) / scale, 1)
    seen = (evaluated - center[None]) / scale[None]
    mask = jnp.ones(evaluated.shape[0], bool) if mask is None else mask

    pool = low[None] + (high - low)[None] * _sequence(key, candidates, n, dtype)
    # The corners are what such a sequence misses, and often the farthest.
    pool = _with_corners(key, pool, low, high)
    near = _nearest(pool, seen, mask)

    def choose(carry: tuple, _: Any) -> tuple[tuple, tuple]:
        near, chosen, number = carry
        best = jnp.argmax(near)
        everything = jnp.concatenate([seen, chosen])
        counts = jnp.concatenate([mask, jnp.arange(count) < number])
        point, distance = _away(pool[best], near[best], everything, counts, low, high, refinements)
        to_it = jnp.sqrt(jnp.sum((pool - point[None]) ** 2, axis=1))
        carry = (jnp.minimum(near, to_it), chosen.at[number].set(point), number + 1)
        return carry, (point, distance)

    start = (near, jnp.zeros((count, n), dtype), jnp.array(0))
    _, (points, distances) = jax.lax.scan(choose, start, None, length=count)
    return Cover(jnp.clip(center[None] + points * scale[None], *_clips(lower, upper)), distances)


def _clips(lower: ArrayLike, upper: ArrayLike) -> tuple[Array, Array]:
    """Bounds that broadcast against rows: rounding must not lead out of them."""
    rows = lambda t: jnp.asarray(t)[None] if jnp.ndim(t) else jnp.asarray(t)  # noqa: E731
    return rows(lower), rows(upper)


def _sequence(key: PRNGKeyArray, count: int, n: int, dtype: Any) -> Float[Array, "count n"]:
    """Points of [0, 1)^n that fill it evenly."""
    root = 2.0
    for _ in range(64):  # p -> (1 + p)**(1 / (n + 1)) contracts
        root = (1.0 + root) ** (1.0 / (n + 1))
    step = root ** -np.arange(1.0, n + 1)
    # In double precision here: multiples of the step lose digits in single.
    multiples = np.arange(1, count + 1)[:, None] * step[None] % 1.0
    shift = jax.random.uniform(key, (n,), dtype)
    return (jnp.asarray(multiples, dtype) + shift[None]) % 1.0


def _with_corners(
    key: PRNGKeyArray, pool: Float[Array, "k n"], low: Float[Array, " n"], high: Float[Array, " n"]
) -> Float[Array, "more n"]:
    """The candidates and corners of the box: all of them for few dimensions, else some."""
    n = low.shape[0]
    if n <= 6:
        bits = np.arange(2**n)[:, None] >> np.arange(n)[None] & 1 > 0
        side = jnp.asarray(bits)
    else:
        side = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (64, n))
    return jnp.concatenate([pool, jnp.where(side, high[None], low[None])])


def _nearest(
    points: Float[Array, "k n"], seen: Float[Array, "m n"], mask: Bool[Array, " m"]
) -> Float[Array, " k"]:
    """The distance of each point to the nearest one that counts, block by block."""
    extra = -seen.shape[0] % BLOCK
    seen = jnp.concatenate([seen, jnp.zeros((extra, seen.shape[1]), seen.dtype)])
    mask = jnp.concatenate([mask, jnp.zeros(extra, bool)])

    def block(near: Array, rows: tuple[Array, Array]) -> tuple[Array, None]:
        some, counts = rows

        def nearer(near: Array) -> Array:
            # Differences, not products: near points must not lose their digits.
            squares = jnp.sum((points[:, None] - some[None]) ** 2, axis=2)
            squares = jnp.where(counts[None], squares, jnp.inf)
            return jnp.minimum(near, jnp.min(squares, axis=1))

        # Most of a long memory is empty at first.
        return jax.lax.cond(jnp.any(counts), nearer, lambda near: near, near), None

    blocks = (seen.reshape(-1, BLOCK, seen.shape[1]), mask.reshape(-1, BLOCK))
    near, _ = jax.lax.scan(block, jnp.full(points.shape[0], jnp.inf, points.dtype), blocks)
    return jnp.sqrt(near)


def _away(
    point: Float[Array, " n"],
    distance: Float[Array, ""],
    seen: Float[Array, "m n"],
    mask: Bool[Array, " m"],
    low: Float[Array, " n"],
    high: Float[Array, " n"],
    steps: int,
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The point moved away from its nearest neighbours as long as that helps."""

    def gaps(x: Array) -> Array:
        squares = jnp.sum((x[None] - seen) ** 2, axis=1)
        return jnp.sqrt(jnp.where(mask, squares, jnp.inf))

    def step(_: Any, carry: tuple) -> tuple:
        x, distance, length = carry
        neighbour = seen[jnp.argmin(gaps(x))]
        way = x - neighbour
        norm = jnp.linalg.norm(way)
        trial = jnp.clip(x + length * way / jnp.where(norm > 0, norm, 1), low, high)
        there = jnp.min(gaps(trial))
        better = there > distance
        x = jnp.where(better, trial, x)
        return x, jnp.where(better, there, distance), jnp.where(better, length, length / 2)

    first = jnp.where(jnp.isfinite(distance), distance / 4, 0).astype(point.dtype)
    point, distance, _ = jax.lax.fori_loop(0, steps, step, (point, distance, first))
    return point, distance
