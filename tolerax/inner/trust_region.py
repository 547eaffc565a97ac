"""The minimum of a quadratic within a ball and a box."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Vector = Float[Array, " n"]
Matrix = Float[Array, "n n"]
SECULAR_STEPS = 12


def in_ball(g: Vector, H: Matrix, radius: Float[Array, ""]) -> Vector:
    """The minimizer of `g's + s'Hs/2` over `|s| <= radius`, for any symmetric H.

    In the basis of eigenvectors it is `-(L + t)^-1 g` with the least t >= 0 for which the matrix is
    positive semidefinite and the length at most the radius; t is found by Newton steps on
    `1/|s| - 1/radius`, kept within bounds. Where g has no part along the lowest eigenvector (the
    "hard case") it is given one of the size of rounding.

    Source: Moré, Sorensen (*SIAM J. Sci. Stat. Comput.* 4, 1983).

    >>> import jax.numpy as jnp
    >>> in_ball(jnp.array([3.0, 0.0]), jnp.diag(jnp.array([1.0, 4.0])), jnp.array(2.0)).round(6)
    Array([-2.,  0.], dtype=float64)
    """
    eps = jnp.finfo(g.dtype).eps
    values, vectors = jnp.linalg.eigh(H)
    a = vectors.T @ g
    scale = jnp.max(jnp.abs(values)) * radius + jnp.linalg.norm(a)
    a = a.at[0].add(jnp.where(a[0] < 0, -1, 1) * 4 * eps * scale)
    size = jnp.abs(a) / radius
    # Every single component, and all together, bound the shift.
    low = jnp.maximum(jnp.max(size - values), 0)
    high = jnp.maximum(jnp.max(jnp.linalg.norm(size) - values), low)
    tiny = jnp.finfo(g.dtype).tiny

    def lengths(t: Array) -> tuple[Array, Array]:
        d = jnp.maximum(values + t, tiny)
        s = a / d
        norm = jnp.linalg.norm(s)
        return norm, jnp.sum(s * s / d)

    def newton(_: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        t, low, high = carry
        norm, slope = lengths(t)
        long = norm > radius
        low, high = jnp.where(long, t, low), jnp.where(long, high, t)
        step = (norm - radius) / radius * norm * norm / jnp.maximum(slope, tiny)
        new = t + step
        inside = (new >= low) & (new <= high)
        return jnp.where(inside, new, 0.5 * (low + high)), low, high

    t, _, _ = jax.lax.fori_loop(0, SECULAR_STEPS, newton, (low, low, high))
    s = -(vectors @ (a / jnp.maximum(values + t, tiny)))
    norm = jnp.linalg.norm(s)
    return jnp.where(norm > radius, s * (radius / norm), s)


def in_ball_and_box(
    g: Vector, H: Matrix, radius: Float[Array, ""], low: Vector, high: Vector
) -> Vector:
    """A step with `|s| <= radius` and `low <= s <= high`, which hold 0, that lowers `g's + s'Hs/2`.

    The minimizer in the ball, as long as it stays in the box; where the way there leaves it, the
    coordinate that leaves first is fixed at its bound, and the rest is minimized again: at most n
    times. That is the minimizer where bounds that are met once stay active, and a good step
    elsewhere; a coordinate whose bound the gradient pushes against is fixed from the start.
    """
    n = g.size
    blocked = ((low >= 0) & (g >= 0)) | ((high <= 0) & (g <= 0))

    def going(carry: tuple[Vector, Bool[Array, " n"], Bool[Array, ""]]) -> Bool[Array, ""]:
        _, free, hit = carry
        return hit & jnp.any(free)

    def step(carry: tuple) -> tuple:
        s, free, _ = carry
        fixed = jnp.where(free, 0, s)
        rest = jnp.sqrt(jnp.maximum(radius**2 - fixed @ fixed, 0))
        rest = jnp.maximum(rest, 1e-3 * radius)
        slope = jnp.where(free, g + H @ fixed, 0)
        both = free[:, None] & free[None, :]
        stiff = jnp.max(jnp.abs(H)) + 1
        goal = in_ball(slope, jnp.where(both, H, jnp.diag(jnp.where(free, 0, stiff))), rest)
        goal = jnp.where(free, goal, fixed)
        way = goal - s
        room = jnp.where(way > 0, high - s, s - low)
        share = jnp.where(free & (way != 0), room / jnp.abs(jnp.where(way == 0, 1, way)), jnp.inf)
        first = jnp.argmin(share)
        hit = share[first] < 1
        s = jnp.clip(s + jnp.clip(share[first], 0, 1) * way, low, high)
        edge = jnp.where(way[first] > 0, high[first], low[first])
        s = jnp.where(hit & (jnp.arange(n) == first), edge, s)
        return s, free & ~(hit & (jnp.arange(n) == first)), hit

    start = (jnp.zeros_like(g), ~blocked, jnp.array(True))
    s, _, _ = jax.lax.while_loop(going, step, start)
    norm = jnp.linalg.norm(s)
    return jnp.where(norm > radius, s * (radius / jnp.where(norm > 0, norm, 1)), s)
