"""Distances to a minimizer from residuals, in the energy norm.

For a strongly convex h with Hessian H >= D (diagonal) everywhere and the self-concordance
`|D^3 h(y)[u, u, v]| <= M |v|_2 u'H(y)u` (Bach, *Electronic Journal of Statistics* 4, 2010; Sun and
Tran-Dinh, *Mathematical Programming* 178, 2019, with nu = 2) the Hessians at two points obey
`exp(-M |y - y'|) H(y) <= H(y') <= exp(M |y - y'|) H(y)`. M = 0 for a quadratic.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""]
Vector = Float[Array, " n"]


def dual_norm(r: Vector, d: Vector) -> Scalar:
    """`|r|_{D^-1}`, an upper bound on `|r|_{H^-1}` for H >= D."""
    return jnp.sqrt(jnp.sum(r * r / d))


def dual_norm_given(
    r: Vector, d: Vector, p: Float[Array, "k n"], ap: Float[Array, "k n"]
) -> Scalar:
    """An upper bound on `|r|_{A^-1}` for A >= D, from the products `ap` of A with the rows of `p`.

    With U = A P - D P the smallest matrix above D with these products is
    `M = D + U (P'U)^-1 U'` (the Nyström approximation of A - D lies below it). The bound is
    `|r|_{M^-1}`: no smaller one follows from the same products. Rows of zeros are left out.

    >>> import jax.numpy as jnp
    >>> A, e = jnp.diag(jnp.array([1.0, 100.0])), jnp.eye(2)
    >>> float(dual_norm_given(e[1], jnp.ones(2), e[1:], e[1:] @ A).round(4))
    0.1
    """
    u = ap - d[None] * p
    # By Sherman, Morrison and Woodbury with T = P'U + U'D^-1 U = U'D^-1 A P.
    t = (u / d[None]) @ ap.T
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(t), 0))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    t = 0.5 * (t + t.T) * inverse[:, None] * inverse[None]
    # More on the diagonal of P'U than there is makes M smaller: a bound still, without rounding.
    noise = jnp.sqrt(jnp.finfo(d.dtype).eps)
    t = t + jnp.diag(jnp.where(size > 0, noise, 1))
    c = inverse * (u @ (r / d))
    squared = jnp.sum(r * r / d)
    gain = jnp.dot(c, jnp.linalg.solve(t, c))
    # Differences of almost equal numbers are not trusted beyond this.
    least = jnp.maximum(squared - gain, 1e2 * noise * squared)
    return jnp.sqrt(jnp.where(gain > 0, least, squared))


def shrink(a: Scalar) -> Scalar:
    """`(1 - exp(-a)) / a`: the mean Hessian over a segment is at least this times the end's."""
    return jnp.where(a > 1e-6, -jnp.expm1(-a) / jnp.where(a > 0, a, 1), 1 - a / 2)


def growth(a: Scalar) -> Scalar:
    """`(exp(a) - 1) / a`: the mean Hessian over a segment is at most this times the end's."""
    many = jnp.expm1(a) / jnp.where(a > 0, a, 1)
    # Where exp overflows, as for a = inf, there is no bound.
    return jnp.where(a > 1e-6, jnp.where(jnp.isnan(many), jnp.inf, many), 1 + a * (1 + a) / 2)


def second_growth(a: Scalar) -> Scalar:
    """`(exp(a) - 1 - a) / a^2`: 1/2 for small a."""
    many = (jnp.expm1(a) - a) / jnp.where(a > 0, a, 1) / jnp.where(a > 0, a, 1)
    few = 0.5 + a / 6 * (1 + a / 3)
    return jnp.where(a > 1e-2, jnp.where(jnp.isnan(many), jnp.inf, many), few)


def excess(a: Scalar) -> Scalar:
    """`(exp(a) - 1 - a) / a`: how far the mean Hessian over a segment is from the end's."""
    return a * second_growth(a)


def at_least(ratio: Scalar) -> Scalar:
    """A lower bound on a, given that `excess(a) >= ratio`: excess(a) <= (exp(a) - 1) / 2."""
    return jnp.log1p(2 * ratio)


def distance(decrement: Scalar, r_dual: Scalar, d: Vector, m: Scalar) -> tuple[Scalar, Scalar]:
    """Bounds on `|y - y*|_H` and on `M |y - y*|_2`, with H the Hessian at y.

    - `decrement`: bound on the Newton decrement `|grad h(y)|_{H^-1}`.
    - `r_dual`: `|grad h(y)|_{D^-1}`, which bounds `|y - y*|_D` by strong convexity.

    With e = y - y* and G the mean Hessian, grad h(y) = G e and G >= shrink(M |e|) H, hence
    `|e|_H shrink(M |e|) <= decrement`. Either `|e| <= |e|_H / sqrt(min D)` is put into this, which
    can be solved while `M decrement < sqrt(min D)`, or `|e| <= r_dual / sqrt(min D)`.
    """
    root = jnp.sqrt(jnp.min(d))
    exponent = lambda t: jnp.where(m > 0, m * t / root, 0)  # noqa: E731
    decrement = jnp.minimum(decrement, r_dual)
    ratio = exponent(decrement)
    solvable = ratio < 0.999
    safe = jnp.where(solvable, ratio, 0.5)
    # -log(1 - ratio) root / M, and its limit for M -> 0.
    local = jnp.where(
        ratio < 1e-6, decrement * (1 + ratio), -jnp.log1p(-safe) * root / jnp.where(m > 0, m, 1)
    )
    local = jnp.where(solvable, local, jnp.inf)
    # Where shrink vanishes, as for a = inf, there is no bound.
    share = shrink(exponent(r_dual))
    t = jnp.minimum(local, jnp.where(share > 0, decrement / share, jnp.inf))
    return t, exponent(jnp.minimum(t, r_dual))


def decrement_for(tolerance: Scalar, d: Vector, m: Scalar) -> Scalar:
    """The Newton decrement that is enough for `distance` to return at most `tolerance`."""
    root = jnp.sqrt(jnp.min(d))
    a = jnp.where(m > 0, m * tolerance / root, 0)
    # tolerance * shrink(a), also for an infinite tolerance.
    return jnp.where(a > 1, -jnp.expm1(-a) * root / jnp.where(m > 0, m, 1), tolerance * shrink(a))
