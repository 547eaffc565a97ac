"""Normal equations of many small linear least-squares problems at once.

Every array has a leading axis of lanes (K). Columns are scaled to length 1 before anything is
factored, which is within a factor sqrt(n) of the best scaling (van der Sluis, *Numerische
Mathematik* 14, 1969).
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from tolerax.inner.cholesky import inverse_factor
from tolerax.inner.rows import Jacobian, dense, transposed
from tolerax.inner.rows import gram as gram_of

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]
Square = Float[Array, "k n n"]
Flags = Bool[Array, " k"]


class Normal(eqx.Module):
    """`|r + J p|^2 + ridge |w + p|^2` as a function of p, in every lane.

    - `gram`: J'J + ridge I; `gradient`: J'r + ridge w. - `scale`: lengths of the columns of J.
    - `free`: the variables that may move.
    - `condition`: estimate of the condition number of the gram matrix of the free variables with
      scaled columns; infinite where it has no Cholesky factor.
    - `ill`: the lanes in which the gram matrix has lost too many digits. They use `root`, the
      factor R of J (scaled) by Householder's QR, and `image` = Q'r.
    """

    gram: Square
    gradient: Rows
    scale: Rows
    free: Bool[Array, "k n"]
    condition: Lane
    ill: Flags
    root: Square
    image: Rows


def _eye(like: Square) -> Float[Array, "1 n n"]:
    return jnp.eye(like.shape[-1], dtype=like.dtype)[None]


def _times(A: Square, b: Rows) -> Rows:
    return jnp.einsum("kij,kj->ki", A, b)


def _solve(inverse: Square, b: Rows) -> Rows:
    """(L L')^-1 b, with the inverse of L."""
    return jnp.einsum("kji,kj->ki", inverse, _times(inverse, b))


def _lengths(gram: Square) -> Rows:
    """Lengths of the columns of J, 1 for those that vanish."""
    square = jnp.diagonal(gram, axis1=1, axis2=2)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def _scaled(gram: Square, scale: Rows) -> Square:
    return gram / (scale[:, :, None] * scale[:, None, :])


def _safe(inverse: Square) -> tuple[Square, Flags]:
    """An inverse with those that failed replaced by the identity, and which did not fail."""
    fine = jnp.all(jnp.isfinite(inverse), axis=(1, 2))
    return jnp.where(fine[:, None, None], inverse, _eye(inverse)), fine


def _convex(gram: Square, extra: Square) -> Square:
    """gram + extra where that is positive definite, else gram. (Turning the negative eigenvalues
    round instead did not save evaluations.)"""
    both = gram + extra
    fine = _safe(inverse_factor(_scaled(both, _lengths(both))))[1]
    return jnp.where(fine[:, None, None], both, gram)


def _unit(normal: Normal) -> Square:
    """The gram matrix of the free variables with scaled columns, 1 on the diagonal for others."""
    both = normal.free[:, :, None] & normal.free[:, None, :]
    return jnp.where(both, _scaled(normal.gram, normal.scale), _eye(normal.gram))


class NewtonStep(eqx.Module):
    """The undamped step: `q` = S p with the lengths S of the columns, the `inverse` of the lower
    factor it was solved with, and its length in the energy norm, `sqrt(g' A^-1 g)` over the free
    variables."""

    q: Rows
    inverse: Square
    decrement: Lane


def normal_equations(
    r: Float[Array, "k m"],
    J: Jacobian,
    w: Rows,
    ridge: Lane,
    wanted: Flags,
    blocked: Callable[[Rows], Bool[Array, "k n"]],
    curvature: Square | None = None,
) -> tuple[Normal, NewtonStep]:
    """The normal equations at w, and the minimizer of the linear model over the variables that are
    not `blocked` by the gradient. QR is taken only if a lane that is `wanted` needs it (under
    `vmap` always: flatten nested batches into the one axis of lanes).

    `curvature`: `sum_i r_i r_i''`, which makes the gram matrix the exact Hessian. It is left out
    where that is not positive definite.
    """
    count, n = w.shape
    eps = jnp.finfo(w.dtype).eps
    eye = jnp.eye(n, dtype=w.dtype)[None]
    gram = gram_of(J) + ridge[:, None, None] * eye
    gradient = transposed(J, r) + ridge[:, None] * w
    if curvature is not None:
        used = jnp.any(curvature != 0)
        gram = jax.lax.cond(used, _convex, lambda gram, _: gram, gram, curvature)
    normal = Normal(
        gram=gram,
        gradient=gradient,
        scale=_lengths(gram),
        free=~blocked(gradient),
        condition=jnp.ones(count, w.dtype),
        ill=jnp.zeros(count, bool),
        root=jnp.zeros_like(gram),
        image=jnp.zeros_like(w),
    )
    inverse, fine = _safe(inverse_factor(_unit(normal)))
    # |B^-1| from two inverse iterations; |B| is at most its trace, n.
    v = jnp.broadcast_to(jnp.cos(1.0 + jnp.arange(n, dtype=w.dtype))[None], (count, n))
    v = _solve(inverse, v)
    v = _solve(inverse, v / jnp.linalg.norm(v, axis=1, keepdims=True))
    condition = jnp.where(fine, n * jnp.linalg.norm(v, axis=1), jnp.inf)
    # A step that is wrong by 1 % still converges, faster than QR could be.
    ill = wanted & ~(eps * condition < 1e-2)

    def by_qr() -> tuple[Square, Rows]:
        rows = jnp.sqrt(ridge)[:, None, None] * eye
        stacked = jnp.concatenate([dense(J), jnp.broadcast_to(rows, (count, n, n))], axis=1)
        right = jnp.concatenate([r, jnp.sqrt(ridge)[:, None] * w], axis=1)
        Q, R = jnp.linalg.qr(stacked / normal.scale[:, None, :])
        return R, jnp.einsum("kmi,km->ki", Q, right)

    nothing = lambda: (normal.root, normal.image)  # noqa: E731
    root, image = jax.lax.cond(jnp.any(ill), by_qr, nothing)
    normal = dataclasses.replace(normal, condition=condition, ill=ill, root=root, image=image)
    return normal, _newton_step(normal, inverse)


def _damped(normal: Normal, damping: Lane, inverse: Square) -> tuple[Rows, Square]:
    """The minimizer q of `|r + J S^-1 q|^2 + damping |q|^2` over the free variables (S: lengths of
    the columns), solved with the inverse of the lower factor of `unit + damping I`; in lanes that
    use QR with another, which is returned in its place."""
    scale, free = normal.scale, normal.free
    n = scale.shape[1]
    eye = _eye(normal.gram)
    b = jnp.where(free, -normal.gradient / scale, 0)
    q = _solve(inverse, b)
    # One step of iterative refinement.
    q = q + _solve(inverse, b - _times(_unit(normal), q) - damping[:, None] * q)

    def by_qr() -> tuple[Rows, Square]:
        # Directions in which J is rounding only are damped away. With no more than rounding itself
        # they would still be followed so far that residuals lose their digits.
        least = (n * jnp.finfo(scale.dtype).eps ** 0.75) ** 2
        shift = jnp.sqrt(jnp.maximum(damping, least))
        bottom = jnp.where(free, shift[:, None], 1)[:, :, None] * eye
        stacked = jnp.concatenate([jnp.where(free[:, None, :], normal.root, 0), bottom], axis=1)
        Q, R = jnp.linalg.qr(stacked)
        right = jnp.einsum("kmi,km->ki", Q[:, :n], -normal.image)
        # More accurate than with an inverse.
        by_root = solve_triangular(R, right[..., None], lower=False)[..., 0]
        ones = jnp.broadcast_to(eye, R.shape)
        lower = solve_triangular(R, ones, trans="T", lower=False)
        ill = normal.ill[:, None]
        return jnp.where(ill, by_root, q), jnp.where(ill[..., None], lower, inverse)

    q, inverse = jax.lax.cond(jnp.any(normal.ill), by_qr, lambda: (q, inverse))
    return jnp.where(free & jnp.isfinite(q), q, 0), inverse


def _newton_step(normal: Normal, inverse: Square) -> NewtonStep:
    """The minimizer of the linear model over the free variables."""
    q, inverse = _damped(normal, jnp.zeros_like(normal.condition), inverse)
    square = jnp.sum(jnp.where(normal.free, -normal.gradient / normal.scale, 0) * q, axis=1)
    return NewtonStep(q, inverse, jnp.sqrt(jnp.maximum(square, 0)))


def trust_region_step(normal: Normal, newton: NewtonStep, radius: Lane) -> tuple[Rows, Lane]:
    """The minimizer p of the linear model with `|S p| <= radius`, to within 10 %, and its damping
    (Moré, *Lecture Notes in Mathematics* 630, 1978: Newton's method on 1 / |S p|)."""

    def too_long(state: tuple) -> Bool[Array, ""]:
        _, q, _, count = state
        return jnp.any(jnp.linalg.norm(q, axis=1) > 1.1 * radius) & (count < 10)

    def more_damping(state: tuple) -> tuple:
        damping, q, inverse, count = state
        length = jnp.linalg.norm(q, axis=1)
        long = length > 1.1 * radius
        half = _times(inverse, q)
        slope = jnp.where(long, jnp.sum(half * half, axis=1), 1)
        change = length * length / slope * (length / radius - 1)
        damping = jnp.where(long, damping + change, damping)
        matrix = _unit(normal) + damping[:, None, None] * _eye(normal.gram)
        return damping, *_damped(normal, damping, _safe(inverse_factor(matrix))[0]), count + 1

    start = (jnp.zeros_like(radius), newton.q, newton.inverse, 0)
    damping, q, _, _ = jax.lax.while_loop(too_long, more_damping, start)
    return q / normal.scale, damping


def by_cholesky(H: Square) -> tuple[Callable[[Rows], Rows], Flags]:
    """Solves with symmetric matrices by Cholesky's method. The second answer: lanes in which they
    are positive definite to working precision."""
    scale = _lengths(H)
    inverse = inverse_factor(_scaled(H, scale))
    # A pivot that is rounding may come out with either sign.
    pivots = 1 / jnp.diagonal(inverse, axis1=1, axis2=2) ** 2
    sound = jnp.min(pivots, axis=1) > _rounding(H)
    inverse, fine = _safe(jnp.where(sound[:, None, None], inverse, jnp.nan))
    return lambda b: _solve(inverse, b / scale) / scale, fine


def _rounding(H: Square) -> float:
    """Eigenvalues that are rounding, those of a matrix with the diagonal 1."""
    return float(10 * H.shape[1] * jnp.finfo(H.dtype).eps)


def factored(H: Square) -> tuple[Callable[[Rows], Rows], Flags]:
    """Solves with symmetric matrices: Cholesky's method where they are positive definite to working
    precision, else by eigenvectors, without those whose eigenvalues are rounding. The second
    answer: lanes in which there are none of these."""
    by_factor, fine = by_cholesky(H)
    scale = _lengths(H)

    def by_eigenvectors() -> tuple[Rows, Square]:
        values, V = jnp.linalg.eigh(_scaled(H, scale))
        return values, V

    nothing = lambda: (jnp.ones_like(scale), jnp.zeros_like(H))  # noqa: E731
    values, V = jax.lax.cond(jnp.all(fine), nothing, by_eigenvectors)
    size = jnp.max(jnp.abs(values), axis=1, keepdims=True)
    kept = jnp.abs(values) > _rounding(H) * size

    def solve(b: Rows) -> Rows:
        along = jnp.einsum("kji,kj->ki", V, b / scale) / jnp.where(kept, values, jnp.inf)
        by_vectors = _times(V, along) / scale
        return jnp.where(fine[:, None], by_factor(b), by_vectors)

    return solve, fine | jnp.all(kept, axis=1)


def by_root(J: Float[Array, "k m n"], S: Square) -> tuple[Callable[[Rows], Rows], Flags]:
    """Solves with J'J + S through J = QR: `R' (I + R^-T S R^-1) R`. What is between has no large
    condition where S is not large; R has that of J. The second answer: lanes in which J has full
    rank to working precision."""
    n = J.shape[2]
    length = jnp.linalg.norm(J, axis=1)
    scale = jnp.where(length > 0, length, 1)
    R = jnp.linalg.qr(J / scale[:, None, :], mode="r")
    pivots = jnp.abs(jnp.diagonal(R, axis1=1, axis2=2))
    whole = jnp.min(pivots, axis=1) > 10 * n * jnp.finfo(J.dtype).eps
    eye = jnp.eye(n, dtype=J.dtype)[None]
    R = jnp.where(whole[:, None, None], R, eye)
    down = lambda b: solve_triangular(R, b, trans="T", lower=False)  # noqa: E731
    half = down(S / (scale[:, :, None] * scale[:, None, :]))
    inner, _ = factored(eye + down(jnp.swapaxes(half, 1, 2)))

    def solve(b: Rows) -> Rows:
        q = inner(down((b / scale)[..., None])[..., 0])
        return solve_triangular(R, q[..., None], lower=False)[..., 0] / scale

    return solve, whole
