"""Linear solves with the Hessian of least squares in lanes, for derivatives of the minimizers."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.inner.krylov import CG
from tolerax.inner.lane_blocks import in_blocks, lanes_at_once
from tolerax.inner.normal_equations import by_cholesky, by_root, factored
from tolerax.inner.residuals import Structured
from tolerax.inner.rows import Jacobian, dense, gram, times, transposed

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]
Flags = Bool[Array, " k"]
Hessian = Literal["exact", "gauss-newton", "cg"]

# Refinements after which a lane goes through a factor of its own Hessian.
ROUNDS = 5


class LaneSolve(eqx.Module):
    """Solutions q of `H q = b` in lanes.

    - `residual`: b - H q with the exact H, whichever was solved with. `error`: in the energy norm,
      as far as the residual says it. - `products`: with H (0 where it was factored).
    - `failed`: lanes where that is not finite, or where a direct solve left more than a thousandth
      of b in the system it was for (and not of rounding alone, which may leave more than b where J
      is ill-conditioned), or conjugate gradients as much without having converged; their q is 0.
    - `shift`: what was added to the residuals so that w is a minimizer exactly, see
      [`solve_hessian`][]. `None`: nothing.
    """

    x: Rows
    residual: Rows
    error: Lane
    failed: Bool[Array, " k"]
    products: Int[Array, " k"]
    shift: Float[Array, "k m"] | None = None


class _Direct(eqx.Module):
    """Of a direct solve: q with what it leaves of b under the exact H (`rest`, `error`), and under
    the matrix that it was for (`own`, `own_error`); lanes in which that matrix is `whole`; and the
    `shift` of residuals."""

    q: Rows
    rest: Rows
    error: Lane
    whole: Flags
    shift: Float[Array, "k m"]
    own: Rows
    own_error: Lane


def solve_hessian(
    fun: Structured,
    w: Rows,
    data: PyTree,
    b: Rows,
    *,
    ridge: Lane,
    free: Bool[Array, "k n"],
    hessian: Hessian,
    tolerance: ArrayLike = 0.0,
    max_products: int = 100,
    block: int | None = None,
    sharding: NamedSharding | None = None,
) -> LaneSolve:
    """Solve `H q = b` over the free variables of every lane, with `H = J'J + ridge + sum r_i r_i''`
    at w, or without the sum (`"gauss-newton"`).

    The direct ways take the residuals to be `r + J p`, with p the Gauss-Newton step that is left:
    with them w is the minimizer exactly, and the solve is that of a problem nearby. With r itself,
    what is left of J'r weighs second derivatives, and these are added to eigenvalues of H as small
    as `1 / condition(J)^2`.

    - `"exact"`, `"gauss-newton"`: Cholesky's method for J'J + ridge, refined with products that go
      through J and not through J'J. Lanes which that does not settle, as the sum is too large or
      H has lost too many digits, go through Cholesky's method for H; through QR of J where H has
      lost its digits; by eigenvectors where J has lost them too: directions without curvature are
      left out of q, and a b that has them fails.
    - `"cg"`: products with the exact H only, until the bound on the error in the energy norm is at
      most `tolerance`, or after `max_products`.
    """
    b = jnp.where(free, b, 0)

    def linear(w: Rows, data: PyTree, ridge: Lane, free: Array) -> tuple[Array, Jacobian, Array]:
        r, J = jax.vmap(fun.with_jacobian)(w, data)
        eye = jnp.eye(w.shape[1], dtype=w.dtype)[None]
        both = free[:, :, None] & free[:, None, :]
        return r, J, jnp.where(both, gram(J) + ridge[:, None, None] * eye, eye)

    def stationary(
        w: Rows, r: Array, J: Jacobian, ridge: Lane, free: Array, solve: Callable[[Rows], Rows]
    ) -> Array:
        g = transposed(J, r) + ridge[:, None] * w
        p = -jnp.where(free, solve(jnp.where(free, g, 0)), 0)
        change = times(J, p)
        return jnp.where(jnp.all(jnp.isfinite(change), axis=1)[:, None], change, 0)

    def exactly(
        w: Rows, data: PyTree, b: Rows, ridge: Lane, free: Array, shift: Array
    ) -> Callable[[Rows], Rows]:
        # b - H q by products with H; forming the sum costs more than all of them.
        half = lambda w, data, shift: 0.5 * jnp.sum(jnp.square(fun(w, data) + shift))  # noqa: E731
        product = jax.linearize(lambda w: jax.vmap(jax.grad(half))(w, data, shift), w)[1]
        return lambda q: b - jnp.where(free, product(q) + ridge[:, None] * q, 0)

    def quick(w: Rows, data: PyTree, b: Rows, ridge: Lane, free: Array) -> _Direct:
        r, J, convex = linear(w, data, ridge, free)
        solve, sound = by_cholesky(convex)
        shift = stationary(w, r, J, ridge, free, solve)
        truly = exactly(w, data, b, ridge, free, shift)

        def without_sum(q: Rows) -> Rows:
            return b - jnp.where(free, transposed(J, times(J, q)) + ridge[:, None] * q, 0)

        left = truly if hessian == "exact" else without_sum

        def measured(q: Rows) -> tuple[Rows, Rows, Rows, Lane]:
            rest = left(q)
            step = jnp.where(free, solve(rest), 0)
            return q, rest, step, energy(rest, step)

        def refined(state: tuple) -> tuple:
            (q, _, step, size), _, count = state
            return measured(q + step), size, count + 1

        def unsettled(state: tuple) -> Bool[Array, ""]:
            (*_, size), before, count = state
            # What hardly falls is rounding, or the sum is too large.
            return jnp.any((size > enough) & (size < 0.1 * before)) & (count < ROUNDS)

        q = jnp.where(free, solve(b), 0)
        whole = energy(b, q)
        enough = jnp.finfo(w.dtype).eps ** 0.75 * whole
        state = jax.lax.while_loop(unsettled, refined, (measured(q), whole, 0))
        q, rest, _, size = state[0]
        settled = sound & (size <= enough)
        true, error = rest, size
        if hessian == "gauss-newton":
            true = truly(q)
            error = energy(true, solve(true))
        return _Direct(q, true, error, settled, shift, rest, size)

    def energy(b: Rows, q: Rows) -> Lane:
        return jnp.sqrt(jnp.abs(jnp.sum(b * q, axis=1)))

    def direct(w: Rows, data: PyTree, b: Rows, ridge: Lane, free: Array) -> _Direct:
        r, J, convex = linear(w, data, ridge, free)
        eye = jnp.eye(w.shape[1], dtype=w.dtype)[None]
        both = free[:, :, None] & free[:, None, :]

        def through_root(S: Array) -> tuple[Callable[[Rows], Rows], Flags]:
            # Of a matrix with the root of the condition.
            bottom = jnp.where(free, jnp.sqrt(ridge)[:, None], 1)[:, :, None] * eye
            top = jnp.where(free[:, None, :], dense(J), 0)
            return by_root(jnp.concatenate([top, bottom], axis=1), S)

        shifted = lambda solve: stationary(w, r, J, ridge, free, solve)  # noqa: E731
        solve, sound = factored(jnp.where(jnp.isfinite(convex), convex, eye))
        shift = shifted(solve)

        def shift_by_qr() -> Array:
            through, usable = through_root(jnp.zeros_like(convex))
            return jnp.where((~sound & usable)[:, None], shifted(through), shift)

        shift = jax.lax.cond(jnp.all(sound), lambda: shift, shift_by_qr)
        r = r + shift
        S = jnp.zeros_like(convex)
        if hessian == "exact":
            S = jnp.where(both, jax.vmap(fun.curvature)(w, data, r), 0)
            H = convex + S
            solve, sound = factored(jnp.where(jnp.isfinite(H), H, eye))

        def left(q: Rows) -> Rows:
            through = transposed(J, times(J, q)) + ridge[:, None] * q
            return b - jnp.where(free, through + jnp.einsum("kij,kj->ki", S, q), 0)

        def refined(solve: Callable[[Rows], Rows]) -> tuple[Rows, Rows]:
            q = jnp.where(free, solve(b), 0)
            for _ in range(2):
                q = q + jnp.where(free, solve(left(q)), 0)
            return q, solve(left(q))

        found = refined(solve)

        def by_qr() -> tuple[Rows, Rows, Flags]:
            through, usable = through_root(jnp.where(jnp.isfinite(S), S, 0))
            ours = (~sound & usable)[:, None]
            new = refined(through)
            q, step = (jnp.where(ours, a, c) for a, c in zip(new, found, strict=True))
            return q, step, sound | usable

        q, step, whole = jax.lax.cond(jnp.all(sound), lambda: (*found, sound), by_qr)
        rest = true = left(q)
        size = error = energy(rest, step)
        if hessian == "gauss-newton":
            true = exactly(w, data, b, ridge, free, shift)(q)
            error = energy(true, solve(true))
        return _Direct(q, true, error, whole, shift, rest, size)

    def bend(w: Array, data: PyTree, q: Array) -> Array:
        along = lambda w: jax.jvp(lambda w: fun(w, data), (w,), (q,))[1]  # noqa: E731
        return jax.jvp(along, (w,), (q,))[1]

    def iterative(w: Array, data: PyTree, b: Array, ridge: Array, free: Array) -> tuple:
        cost = lambda w: 0.5 * jnp.sum(jnp.square(fun(w, data))) + 0.5 * ridge * w @ w  # noqa: E731
        product = jax.linearize(jax.grad(cost), w)[1]
        least = jnp.maximum(ridge, jnp.finfo(w.dtype).eps)
        solved = CG(max_products)(
            lambda v: jnp.where(free, product(jnp.where(free, v, 0)), v),
            b,
            lower_bound=jnp.full_like(b, least),
            tolerance=tolerance,
        )
        return solved.x, solved.residual, solved.error, solved.products, solved.converged

    def large(rest: Rows) -> Flags:
        return jnp.linalg.norm(rest, axis=1) > 1e-3 * jnp.linalg.norm(b, axis=1)

    def outcome(q: Rows, rest: Rows, error: Lane, bad: Flags, products: Array, shift: Any) -> Any:
        failed = bad | ~jnp.all(jnp.isfinite(q) & jnp.isfinite(rest), axis=1)
        return LaneSolve(jnp.where(failed[:, None], 0, q), rest, error, failed, products, shift)

    given = (w, data, b, ridge, free)
    if hessian == "cg":
        solved = in_blocks(jax.vmap(iterative), block, sharding, *given)
        q, rest, error, products, converged = solved
        return outcome(q, rest, error, ~converged & large(rest), products, None)
    together = lanes_at_once(fun, w, data) if block is None else block
    near = in_blocks(quick, together, sharding, *given)

    def again() -> _Direct:
        def one(near: _Direct, *given: Any) -> _Direct:
            return jax.lax.cond(jnp.all(near.whole), lambda: near, lambda: direct(*given))

        return in_blocks(one, block, sharding, near, *given)

    found = jax.lax.cond(jnp.all(near.whole), lambda: near, again)
    much = large(found.own)

    def by_rounding() -> Flags:
        # Of products, which leaves no error in q; or of the residuals that weigh S as well.
        size = jnp.abs(jnp.sum(b * found.q, axis=1))
        excused = found.whole & (found.own_error <= 1e-3 * jnp.sqrt(size))
        if hessian == "gauss-newton":
            return excused
        r = jax.vmap(fun)(w, data) + found.shift
        bent = jnp.linalg.norm(r * jax.vmap(bend)(w, data, found.q), axis=1)
        return excused & (jnp.finfo(w.dtype).eps * bent <= 1e-3 * size)

    rounding = jax.lax.cond(jnp.any(much & found.whole), by_rounding, lambda: jnp.zeros_like(much))
    products = jnp.zeros(w.shape[0], jnp.result_type(int))
    return outcome(found.q, found.rest, found.error, much & ~rounding, products, found.shift)


def positions(w: Rows, bounds: Any) -> Bool[Array, "k n"]:
    """Which variables no bound holds."""
    if bounds is None:
        return jnp.ones(w.shape, bool)
    lower, upper = bounds
    return (w > lower) & (w < upper)
