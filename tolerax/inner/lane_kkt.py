"""Least squares in lanes under equations that hold exactly: steps and adjoints of KKT systems."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Float, PyTree

from tolerax.inner.lane_adjoint import LaneSolve
from tolerax.inner.lane_blocks import in_blocks
from tolerax.inner.levenberg_marquardt import LeastSquaresResult
from tolerax.inner.residuals import Structured
from tolerax.inner.rows import gram, times, transposed
from tolerax.status import PointStatus

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]
STEPS, RESTORE = 20, 10


def hold(
    fun: Structured,
    held: Callable,
    found: LeastSquaresResult,
    data: PyTree,
    more: PyTree,
    ridge: ArrayLike,
    tolerance: ArrayLike,
    *,
    block: int | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[LeastSquaresResult, Float[Array, "k p"]]:
    """From the minimizers without the equations `held(w, more) = 0` to those with them, and their
    multipliers, by Newton's method on the KKT system (Nocedal, Wright, *Numerical Optimization*,
    section 18.1).

    Each lane goes on until the step is at most `tolerance` in the energy norm and the equations
    hold to rounding, or no longer get better; at most 20 steps, which count as evaluations. Lanes
    whose equations do not hold to 1e-9, or to 100 units of rounding in float32, then have the
    status `inaccurate`.
    """
    ridge = jnp.broadcast_to(jnp.asarray(ridge, found.w.dtype), found.cost.shape)
    eps = jnp.finfo(found.w.dtype).eps
    # Equations are scaled to about 1: sums of thousands of such terms are rounded by some tens of
    # eps.
    holds, exact_enough = jnp.maximum(1e-9, 100 * eps), jnp.maximum(1e-12, 100 * eps)

    def lane(w: Array, data: PyTree, more: PyTree, ridge: Array, failed: Array) -> tuple:
        first = jnp.zeros_like(held(w, more))

        def unfinished(state: tuple) -> Array:
            _, _, size, length, before, step = state
            fine = (size <= 10 * eps) & (length <= tolerance)
            # Rounding keeps both from falling for ever.
            stuck = (step > 2) & (size >= 0.5 * before) & (size <= holds) & (length <= tolerance)
            return ~(fine | stuck | failed) & (step < STEPS)

        def newton(state: tuple) -> tuple:
            w, multipliers, size, _, _, step = state
            exact, g, c, A, convex = _system(fun, held, w, multipliers, data, more, ridge)
            # Descent needs a matrix that is positive definite where the equations leave room.
            weight = jnp.trace(convex) / jnp.maximum(jnp.sum(A * A), eps)
            factor = jnp.linalg.cholesky(exact + 10 * weight * A.T @ A, symmetrize_input=False)
            H = jnp.where(jnp.all(jnp.isfinite(factor)), exact, convex)
            matrix = jnp.block([[H, A.T], [A, jnp.zeros((len(c), len(c)), w.dtype)]])
            change = _solve(matrix, -jnp.concatenate([g, c]))
            p = change[: len(w)]
            length = jnp.sqrt(jnp.maximum(p @ H @ p, 0))
            w = w + p
            now = jnp.max(jnp.abs(held(w, more)))
            return w, change[len(w) :], now, length, size, step + 1

        inf = jnp.array(jnp.inf, w.dtype)
        start = (w, first, inf, inf, inf, 0)
        w, multipliers, size, length, _, steps = jax.lax.while_loop(unfinished, newton, start)

        def restored(state: tuple) -> tuple:
            w, _, step = state
            _, _, c, A, H = _system(fun, held, w, multipliers, data, more, ridge)
            matrix = jnp.block([[H, A.T], [A, jnp.zeros((len(c), len(c)), w.dtype)]])
            w = w + _solve(matrix, jnp.concatenate([jnp.zeros_like(w), -c]))[: len(w)]
            return w, jnp.max(jnp.abs(held(w, more))), step + 1

        # What does not converge holds the equations all the same.
        more_steps = lambda s: (s[1] > 10 * eps) & (s[2] < RESTORE) & ~failed  # noqa: E731
        off = jnp.where(size <= exact_enough, 0, size)
        w, off, others = jax.lax.while_loop(more_steps, restored, (w, off, 0))
        return w, multipliers, jnp.where(off > 0, off, size), length, steps + others

    failed = jax.vmap(lambda s: s == PointStatus.failed)(found.status)
    given = (found.w, data, more, ridge, failed)
    w, multipliers, size, length, steps = in_blocks(jax.vmap(lane), block, sharding, *given)
    fine = jnp.all(jnp.isfinite(w), axis=1) & jnp.all(jnp.isfinite(multipliers), axis=1) & ~failed
    w = jnp.where(fine[:, None], w, found.w)
    multipliers = jnp.where(fine[:, None], multipliers, 0)
    rows = jax.vmap(fun)(w, data)
    cost = 0.5 * jnp.sum(rows * rows, axis=1) + 0.5 * ridge * jnp.sum(w * w, axis=1)

    def status(old: Any, fine: Array, size: Array, length: Array) -> Any:
        bad = (size > holds) | (length > tolerance)
        new = PointStatus.where(bad, PointStatus.inaccurate, PointStatus.ok)
        new = PointStatus.where(fine, new, PointStatus.inaccurate)
        return PointStatus.where(old == PointStatus.failed, old, new)

    answer = dataclasses.replace(
        found,
        w=w,
        cost=cost,
        error=jnp.where(failed, found.error, length),
        evaluations=found.evaluations + steps,
        status=jax.vmap(status)(found.status, fine, size, length),
    )
    return answer, multipliers


def solve_held(
    fun: Structured,
    held: Callable,
    y: Rows,
    data: PyTree,
    more: PyTree,
    b: Rows,
    ridge: ArrayLike,
    rows_held: int,
    *,
    block: int | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[LaneSolve, Float[Array, "k p"]]:
    """Solve with the KKT matrices at y = (w, multipliers): the Hessian of the Lagrangian, and the
    derivatives of the equations beside and below it. Residuals are shifted as in
    [`solve_hessian`][], and multipliers changed to those that make w stationary then: the second
    answer is that change."""
    ridge = jnp.broadcast_to(jnp.asarray(ridge, y.dtype), y.shape[:1])

    def lane(y: Array, data: PyTree, more: PyTree, b: Array, ridge: Array) -> tuple:
        n = y.size - rows_held
        w, multipliers = y[:n], y[n:]
        _, g, c, A, convex = _system(fun, held, w, multipliers, data, more, ridge)
        corner = jnp.zeros((len(c), len(c)), y.dtype)
        step = _solve(jnp.block([[convex, A.T], [A, corner]]), -jnp.concatenate([g, 0 * c]))
        fine = jnp.all(jnp.isfinite(step))
        multipliers = jnp.where(fine, step[n:], multipliers)
        r, J = fun.with_jacobian(w, data)
        one = jax.tree.map(lambda leaf: leaf[None], J)
        shift = times(one, jnp.where(fine, step[:n], 0)[None])[0]
        H, *_ = _system(fun, held, w, multipliers, data, more, ridge, r + shift)
        matrix = jnp.block([[H, A.T], [A, corner]])
        q = _solve(matrix, b)
        rest = b - matrix @ q
        error = jnp.sqrt(jnp.abs(jnp.vdot(rest, _solve(matrix, rest))))
        return q, rest, error, shift, multipliers - y[n:]

    given = (y, data, more, b, ridge)
    q, rest, error, shift, change = in_blocks(jax.vmap(lane), block, sharding, *given)
    failed = ~jnp.all(jnp.isfinite(q) & jnp.isfinite(rest), axis=1)
    failed = failed | (jnp.linalg.norm(rest, axis=1) > 1e-3 * jnp.linalg.norm(b, axis=1))
    products = jnp.zeros(y.shape[0], jnp.result_type(int))
    x = jnp.where(failed[:, None], 0, q)
    return LaneSolve(x, rest, error, failed, products, shift), change


def _solve(matrix: Array, b: Array) -> Array:
    """By LU with rows and columns of length about 1, and one step of refinement."""
    size = jnp.sqrt(jnp.max(jnp.abs(matrix), axis=1))
    scale = 1 / jnp.where(size > 0, size, 1)
    unit = matrix * scale[:, None] * scale[None, :]
    factors = jax.scipy.linalg.lu_factor(unit)
    solve = lambda b: scale * jax.scipy.linalg.lu_solve(factors, scale * b)  # noqa: E731
    x = solve(b)
    return x + solve(b - matrix @ x)


def _system(
    fun: Structured,
    held: Callable,
    w: Array,
    multipliers: Array,
    data: PyTree,
    more: PyTree,
    ridge: Array,
    rows: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Hessian of the Lagrangian in w, gradient of the cost, the equations, their derivatives, and
    the Hessian without second derivatives; with `rows` in place of the residuals at w."""
    r, J = fun.with_jacobian(w, data)
    r = r if rows is None else rows
    one = jax.tree.map(lambda leaf: leaf[None], J)
    convex = gram(one)[0] + ridge * jnp.eye(len(w), dtype=w.dtype)
    H = convex + fun.curvature(w, data, r)
    H = H + jax.hessian(lambda w: jnp.vdot(multipliers, held(w, more)))(w)
    g = transposed(one, r[None])[0] + ridge * w
    return H, g, held(w, more), jax.jacrev(lambda w: held(w, more))(w), convex
