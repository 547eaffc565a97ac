"""The quadratic subproblem of an SQP step, stabilized so that it always has a solution."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.contracts import Work
from tolerax.inner.kkt import KKTSolver, KKTSystem

Vector = Float[Array, "..."]


class Rows(eqx.Module):
    """Values c of the rows, the interval each must lie in, and which are equalities."""

    values: Float[Array, " m"]
    lower: Float[Array, " m"]
    upper: Float[Array, " m"]

    @property
    def equal(self) -> Bool[Array, " m"]:
        return self.lower == self.upper

    def within(self, w: Vector) -> Vector:
        """The nearest admissible values."""
        return jnp.clip(w, self.lower, self.upper)

    def active(self, w: Vector) -> Bool[Array, " m"]:
        """Which rows hold as equalities where `w = c + multiplier * weight`."""
        return self.equal | (w < self.lower) | (w > self.upper)


class Step(eqx.Module):
    """A step in x and multipliers, the model's curvature along it and the solves it took."""

    d: Vector
    e: Vector
    curvature: Float[Array, ""]
    active: Bool[Array, " m"]
    spent: Work
    good: Bool[Array, ""]


def quadratic_step(
    solver: KKTSolver,
    prepared: Any,
    system: KKTSystem,
    gradient: Vector,
    rows: Rows,
    y: Vector,
    weight: Vector,
    working: Bool[Array, " m"],
    *,
    only_equalities: bool,
    relative: ArrayLike,
    image: tuple[Vector, Vector] | None = None,
    max_sets: int = 60,
) -> Step:
    """Minimize over d

        g'd + d'Bd / 2 + sum over rows of dist^2(c + a'd + w y, [lower, upper]) / (2 w)

    by Newton's method on active sets with an exact line search; the new multipliers are
    `y + e = (v - P(v)) / w` at `v = c + A d + w y`. With w to 0 this is the quadratic program of
    SQP; with w > 0 it has a solution also where the linearized constraints have none, and
    multipliers are finite where constraints depend on each other.

    - `gradient`: g, without multipliers. `weight`: w > 0, one a row. `working`: the first guess of
      the active rows. `only_equalities`: there is but one active set.
    """
    lagrangian = gradient + system.transposed(y)

    def solve(active: Bool[Array, " m"], side: Vector, start: Any) -> Any:
        # Rows that do not hold say -w e = w y: their multiplier becomes 0.
        b = jnp.where(active, side - rows.values, weight * y)
        return solver.solve(
            prepared, active, weight, -lagrangian, b, relative=relative, image=start
        )

    if only_equalities:
        every = jnp.ones(rows.values.shape, bool)
        found = solve(every, rows.upper, image)
        curvature = jnp.dot(found.d, solver.hessian(prepared, found.d))
        good = jnp.all(jnp.isfinite(found.d)) & jnp.all(jnp.isfinite(found.e))
        return Step(found.d, found.e, curvature, every, found.spent, good)

    slack = 1e-10 * (1 + jnp.max(jnp.abs(y), initial=0) + jnp.linalg.norm(gradient))

    def multipliers(w: Vector) -> Vector:
        return (w - rows.within(w)) / weight

    def body(state: tuple) -> tuple:
        d, w, active, side, _, count, spent, _, _ = state
        found = solve(active, side, None)
        finite = jnp.all(jnp.isfinite(found.d)) & jnp.all(jnp.isfinite(found.e))
        p = jnp.where(finite, found.d - d, 0)
        ap, bp = system.rows(p), solver.hessian(prepared, p)
        at = gradient + solver.hessian(prepared, d)

        def slope(t: Array) -> Array:
            return jnp.dot(at + t * bp, p) + jnp.dot(multipliers(w + t * ap), ap)

        # What the full step says of the rows: signs of multipliers where they hold.
        new = y + found.e
        above = side == rows.upper
        keeps = active & (rows.equal | jnp.where(above, new >= -slack, new <= slack))
        full = w + ap
        joins = ~active & (
            (full < rows.lower - slack * weight) | (full > rows.upper + slack * weight)
        )
        settled = finite & jnp.all(keeps == active) & ~jnp.any(joins)
        falls = finite & (slope(jnp.zeros(())) < 0)

        def halve(_: Any, ends: tuple) -> tuple:
            low, high = ends
            middle = 0.5 * (low + high)
            up = slope(middle) > 0
            return jnp.where(up, low, middle), jnp.where(up, middle, high)

        one = jnp.ones((), p.dtype)
        low, _ = jax.lax.fori_loop(0, 50, halve, (0 * one, one))
        t = jnp.where(settled | (slope(one) <= 0), one, low)
        t = jnp.where(settled | falls, t, 0)
        d, w = d + t * p, w + t * ap
        next_active = jnp.where(t == 1, keeps | joins, rows.active(w))
        # A first guess that gave no descent is replaced by the rows that hold.
        next_active = jnp.where(settled, active, next_active)
        next_side = jnp.where(rows.equal | (w > rows.upper), rows.upper, rows.lower)
        next_side = jnp.where(active & next_active, side, next_side)
        stuck = ~finite | ((t == 0) & jnp.all(next_active == active))
        e = jnp.where(settled, found.e, multipliers(w) - y)
        return d, w, next_active, next_side, e, count + 1, spent + found.spent, settled, stuck

    def going(state: tuple) -> Bool[Array, ""]:
        *_, count, _, settled, stuck = state
        return (count < max_sets) & ~settled & ~stuck

    w = rows.values + weight * y
    side = jnp.where(rows.equal | (w > rows.upper) | (y > 0), rows.upper, rows.lower)
    side = jnp.where(jnp.isfinite(side), side, jnp.where(y > 0, rows.lower, rows.upper))
    working = working & jnp.isfinite(side)
    false, zero = jnp.array(False), jnp.array(0, jnp.result_type(int))
    start = (jnp.zeros_like(gradient), w, working, side, 0 * y, zero, Work(), false, false)
    d, _, active, _, e, _, spent, settled, stuck = jax.lax.while_loop(going, body, start)
    good = jnp.all(jnp.isfinite(d)) & jnp.all(jnp.isfinite(e)) & (settled | ~stuck)
    curvature = jnp.dot(d, solver.hessian(prepared, d))
    return Step(d, e, curvature, active, spent, good)
