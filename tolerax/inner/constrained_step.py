"""The minimum of a quadratic under quadratic constraints, within a ball and a box."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tolerax.inner.interpolation import Quadratic
from tolerax.inner.trust_region import in_ball

Vector = Float[Array, " n"]
Rows = Float[Array, " p"]
OUTER, INNER = 15, 10
WEIGHT, HEAVIER, HEAVIEST = 10.0, 10.0, 1e8  # the first weight of the rows, its growth, the last


class ConstrainedStep(NamedTuple):
    """A step, the multipliers of the constraints, and whether both were found."""

    s: Vector
    multipliers: Rows
    found: Array


def constrained_step(
    objective: Quadratic,
    constraints: Quadratic,
    lower: Rows,
    upper: Rows,
    low: Vector,
    high: Vector,
    multipliers: Rows,
) -> ConstrainedStep:
    """A local minimizer of a quadratic over `lower <= c(s) <= upper`, quadratic as well,
    `|s| <= 1` and `low <= s <= high`, which hold 0. Where no step meets the constraints, one that
    violates them least, in the sense of least squares of rows that are scaled by what they may
    change within the ball.

    The method of multipliers, with the ball and the box as rows beside the constraints. Its
    unconstrained minima are found by Newton steps: a search along the way to the minimizer of the
    local quadratic over the ball, and along the way downhill in the metric of the Hessian with its
    eigenvalues made positive.

    - `multipliers`: the first guess; their signs are those of `f + <multipliers, c>`.

    Source: Nocedal, Wright (*Numerical Optimization*, 2006), section 17.4.

    >>> import jax.numpy as jnp
    >>> from tolerax.inner.interpolation import Quadratic
    >>> # The lowest point of a disc of radius sqrt(1.09) around (-0.3, 1).
    >>> height = Quadratic(jnp.array(0.0), jnp.array([0.0, 1.0]), jnp.zeros((2, 2)))
    >>> bowl = Quadratic(jnp.zeros(1), jnp.array([[0.3, -1.0]]), jnp.eye(2)[None])
    >>> side, any_multiplier = jnp.ones(2), jnp.zeros(1)
    >>> step = constrained_step(
    ...     height, bowl, jnp.array([-jnp.inf]), jnp.zeros(1), -side, side, any_multiplier
    ... )
    >>> bool(jnp.allclose(step.s, jnp.array([-0.3, 1 - 1.09**0.5])))
    True
    """
    n, dtype = low.size, low.dtype
    tiny = jnp.finfo(dtype).tiny

    def reach(q: Quadratic) -> Array:
        curved = jnp.linalg.norm(q.H.reshape(*q.g.shape[:-1], -1), axis=-1)
        return jnp.linalg.norm(q.g, axis=-1) + 0.5 * curved

    unit = reach(objective)
    unit = jnp.where(unit > tiny, unit, 1)
    size = reach(constraints)
    size = jnp.where(size > tiny, size, 1)
    g, H = objective.g / unit, objective.H / unit
    # The ball and the sides of the box are rows as well.
    p, eye, one = size.size, jnp.eye(n, dtype=dtype), jnp.ones((), dtype)
    c = jnp.concatenate([constraints.c / size, jnp.zeros(1 + n, dtype)])
    a = jnp.concatenate([constraints.g / size[:, None], jnp.zeros((1, n), dtype), eye])
    bent = jnp.concatenate([constraints.H / size[:, None, None], eye[None]])
    least = jnp.concatenate([lower / size, jnp.array([-jnp.inf], dtype), low])
    most = jnp.concatenate([upper / size, jnp.array([0.5], dtype), high])
    y = jnp.concatenate([multipliers * size / unit, jnp.zeros(1 + n, dtype)])
    resolved = 100 * jnp.finfo(dtype).eps
    shares = 0.5 ** jnp.arange(9, dtype=dtype)

    def rows(s: Vector) -> Array:
        curved = 0.5 * ((bent @ s) @ s)
        return c + a @ s + jnp.concatenate([curved, jnp.zeros(n, dtype)])

    def outside(w: Array) -> Array:
        return w - jnp.clip(w, least, most)

    def lagrangian(s: Vector, y: Array, weight: Array) -> Array:
        r = outside(rows(s) + y / weight)
        return g @ s + 0.5 * (H @ s) @ s + 0.5 * weight * jnp.sum(r * r)

    def newton(carry: tuple) -> tuple:
        s, y, weight, value, count, _ = carry
        r = outside(rows(s) + y / weight)
        slopes = a + jnp.concatenate([bent @ s, jnp.zeros((n, n), dtype)])
        active = jnp.where((r != 0) | (least == most), 1, 0).astype(dtype)
        gradient = g + H @ s + weight * (slopes.T @ r)
        curved = jnp.einsum("p,pij->ij", r[: p + 1], bent)
        hessian = H + weight * (curved + (slopes * active[:, None]).T @ slopes)
        goal = in_ball(gradient - hessian @ s, hessian, one)
        # Where the best of the whole ball is far away, a step downhill from here.
        values, vectors = jnp.linalg.eigh(hessian)
        stiff = jnp.maximum(jnp.abs(values), 1e-8 * jnp.max(jnp.abs(values)) + tiny)
        near = s - vectors @ ((vectors.T @ gradient) / stiff)
        ways = jnp.stack([goal - s, near - s])
        trials = (s[None, None] + shares[:, None, None] * ways[None]).reshape(-1, n)
        values = jax.vmap(lambda t: lagrangian(t, y, weight))(trials)
        i = jnp.argmin(values)
        better = values[i] < value - resolved * jnp.abs(value)
        s = jnp.where(better, trials[i], s)
        return s, y, weight, jnp.where(better, values[i], value), count + 1, better

    def minimized(s: Vector, y: Array, weight: Array) -> Vector:
        begin = (s, y, weight, lagrangian(s, y, weight), jnp.array(0), jnp.array(True))
        return jax.lax.while_loop(lambda k: k[5] & (k[4] < INNER), newton, begin)[0]

    def outer(carry: tuple) -> tuple:
        s, y, weight, before, count, _ = carry
        s = minimized(s, y, weight)
        r = outside(rows(s) + y / weight)
        # What the rows miss, or multipliers have too much.
        missed = jnp.max(jnp.abs(r - y / weight))
        found = missed <= 1e-10 if dtype == jnp.float64 else missed <= 1e-5
        slow = missed > 0.1 * before
        return (
            s,
            weight * r,
            jnp.where(slow, jnp.minimum(HEAVIER * weight, HEAVIEST), weight),
            missed,
            count + 1,
            found,
        )

    start = jnp.zeros(n, dtype)
    begin = (start, y, jnp.asarray(WEIGHT, dtype), jnp.array(jnp.inf, dtype), jnp.array(0))
    going = lambda k: ~k[5] & (k[4] < OUTER)  # noqa: E731
    s, y, _, _, _, found = jax.lax.while_loop(going, outer, (*begin, jnp.array(False)))
    s = s / jnp.maximum(1, jnp.linalg.norm(s))
    return ConstrainedStep(jnp.clip(s, low, high), y[:p] * unit / size, found)
