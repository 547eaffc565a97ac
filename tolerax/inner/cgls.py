"""Conjugate gradients for linear least squares in a trust region, by products with J and J'."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

Vector = Float[Array, " n"]
Residual = Float[Array, " m"]
Scalar = Float[Array, ""]


class Model(NamedTuple):
    """`|r + J p|^2 / 2 + ridge |w + p|^2 / 2` as a function of the step p, over the variables that
    are `free`; with `bend`, products with `sum_i r_i r_i''`, the Taylor polynomial of the squares.

    - `push`, `pull`: products with J and with J'. - `gradient`: at p = 0.
    - `scale`: a diagonal that resembles that of J'J + ridge. Lengths of steps are measured with it.
    """

    push: Callable[[Vector], Residual]
    pull: Callable[[Residual], Vector]
    bend: Callable[[Vector], Vector] | None
    r: Residual
    w: Vector
    gradient: Vector
    ridge: Scalar
    scale: Vector
    free: Bool[Array, " n"]

    def along(self, d: Vector) -> tuple[Residual, Vector, Scalar]:
        """J d, the second derivatives along d, and the curvature d'A d."""
        image = self.push(d)
        bent = jnp.zeros_like(d) if self.bend is None else self.bend(d)
        return image, bent, image @ image + self.ridge * (d @ d) + d @ bent

    def gradient_at(self, p: Vector, image: Residual, bent: Vector) -> Vector:
        """Its gradient at p, from J p and the second derivatives along p. With J'(J p) in place of
        a recurrence for (J'J) p the digits of J are what counts, not those of J'J."""
        return self.gradient + self.pull(image) + self.ridge * p + bent

    def length(self, p: Vector) -> Scalar:
        """`|p|` in the scaling."""
        return jnp.sqrt(p @ (self.scale * p))


class Ritz(NamedTuple):
    """What the coefficients of conjugate gradients say of the spectrum of the scaled matrix.

    Its Lanczos matrix is L L' with a bidiagonal L. `inverse` estimates `|L^-1|^2`, and with it one
    over the smallest eigenvalue, from below: by a step of incremental norm estimation an iteration
    (Meurant, Tichý, *Numerical Algorithms* 82, 2019), which keeps the squared norm of the `last`
    row of L^-1 and its `product` with the vector that the estimate comes from. `largest`: the
    largest diagonal entry of the Lanczos matrix, which is at most the largest eigenvalue.
    """

    inverse: Scalar
    largest: Scalar
    last: Scalar
    product: Scalar
    alpha: Scalar
    beta: Scalar

    @classmethod
    def nothing(cls, like: Scalar) -> "Ritz":
        """Before the first iteration."""
        zero = jnp.zeros_like(like)
        return cls(zero, zero, zero, zero, zero + jnp.inf, zero)

    def told(self, alpha: Scalar, beta: Scalar) -> "Ritz":
        """After an iteration with the factors of the step (alpha) and of the direction (beta)."""
        coupling = self.beta * alpha / self.alpha
        last = coupling * self.last + alpha
        off = -jnp.sqrt(coupling) * self.product
        # The larger eigenvalue of [[inverse, off], [off, last]], and the share of `last` in it.
        half = jnp.sqrt((0.5 * (self.inverse - last)) ** 2 + off * off)
        inverse = 0.5 * (self.inverse + last) + half
        share = jnp.where(half > 0, 0.5 * (inverse - self.inverse) / half, 1)
        return Ritz(
            inverse=inverse,
            largest=jnp.maximum(self.largest, 1 / alpha + self.beta / self.alpha),
            last=last,
            product=jnp.where(off < 0, -1, 1) * jnp.sqrt(share) * inverse,
            alpha=alpha,
            beta=beta,
        )


class Truncated(NamedTuple):
    """Where conjugate gradients stopped.

    - `p`: the step. `gone`: twice what the model falls by, the part of the squared distance from
      p = 0 to the minimizer, in the energy norm, that is behind it.
    - `left`: upper bound on the rest. `estimate`: what the directions of this solve say of it.
    - `ritz`: of the spectrum. `iterations`: products with J, and with J'.
    """

    p: Vector
    gone: Scalar
    left: Scalar
    estimate: Scalar
    ritz: Ritz
    iterations: Int[Array, ""]


class _State(NamedTuple):
    """`image` = J p, `bent` the second derivatives along p, `s` the gradient at p, `d` the next
    direction, `square` = `|s|^2` in the inverse of the scaling; `flat` and `radau`: the factors of
    the bounds, see `truncated`."""

    p: Vector
    image: Residual
    bent: Vector
    s: Vector
    d: Vector
    square: Scalar
    gone: Scalar
    flat: Scalar
    radau: Scalar
    ritz: Ritz
    ended: Bool[Array, ""]
    step: Int[Array, ""]


def truncated(
    model: Model,
    radius: Scalar,
    *,
    tolerance: Scalar,
    relative: ArrayLike,
    inverse: Scalar,
    most: ArrayLike,
) -> Truncated:
    """Minimize the model within a `radius` until the whole distance is at most `tolerance`, or is
    known to be more and a share `relative` of it is left; by at most so many iterations. Steps that
    would leave the trust region end at its boundary, and so do directions of negative curvature
    (Steihaug, *SIAM J. Numer. Anal.* 20, 1983; Toint, 1981).

    What is left of the squared distance at p, where the gradient is s, is at most the smallest of

    - `|r + J p|^2 + ridge |w + p|^2`: s is a projection of these rows;
    - with a ridge `|s|^2 / ridge`, and the Gauss-Radau bound with that lower bound on the spectrum,
      as of [`CG`][];
    - without one, `flat |s|^2 / smallest` with the smallest eigenvalue seen, now or before
      (`inverse` is one over it), and `flat = |s|^2 / |d|^2`, all in the scaling (Meurant, Tichý).
      This is no bound where s has a part in directions with smaller ones.

    With second derivatives only the last can be said.
    """
    g, ridge = model.gradient, model.ridge
    eps, tiny = jnp.finfo(g.dtype).eps, jnp.finfo(g.dtype).tiny
    floor = jnp.maximum((1 - 1e-7) * ridge / jnp.max(model.scale), tiny)

    def free(v: Vector) -> Vector:
        return jnp.where(model.free, v, 0)

    def rest(state: _State) -> tuple[Scalar, Scalar]:
        def with_smallest(inverse: Scalar) -> Scalar:
            size = jnp.where(inverse > 0, state.flat * state.square * inverse, jnp.inf)
            return jnp.where(state.square > 0, size, 0)

        estimate = with_smallest(state.ritz.inverse)
        left = with_smallest(jnp.maximum(state.ritz.inverse, inverse))
        if model.bend is None:
            given = state.s @ state.s / jnp.maximum(ridge, tiny)
            given = jnp.minimum(given, state.radau * state.square)
            rows, w = model.r + state.image, free(model.w + state.p)
            left = jnp.where(ridge > 0, given, left)
            left = jnp.minimum(left, rows @ rows + ridge * (w @ w))
        return left, jnp.minimum(left, estimate)

    def unfinished(state: _State) -> Bool[Array, ""]:
        left, estimate = rest(state)
        far = state.gone > tolerance**2
        share = jnp.maximum(relative**2 * (state.gone + estimate), 0.25 * tolerance**2)
        enough = (state.gone + left <= tolerance**2) | (far & (estimate <= share))
        # Below this the gradient is made of rounding.
        size = state.image @ state.image + ridge * (state.p @ state.p)
        noise = (4 * eps) ** 2 * (state.ritz.largest * size + first)
        going = ~enough & ~state.ended & (state.square > noise)
        return going & (state.step < most)

    def body(state: _State) -> _State:
        p, d, square = state.p, state.d, state.square
        image, bent, curvature = model.along(d)
        pp, pd, dd = (a @ (model.scale * b) for a, b in ((p, p), (p, d), (d, d)))
        lost = curvature <= (8 * eps) ** 2 * state.ritz.largest * dd
        alpha = square / jnp.where(lost, 1, curvature)
        room = jnp.maximum(radius**2 - pp, 0)
        edge = jnp.where(radius < jnp.inf, room / (pd + jnp.sqrt(pd * pd + dd * room)), 0)
        ended = lost | (pp + alpha * (2 * pd + alpha * dd) >= radius**2)
        t = jnp.where(ended, edge, alpha)
        p, image, bent = p + t * d, state.image + t * image, state.bent + t * bent
        s = free(model.gradient_at(p, image, bent))
        z = s / model.scale
        new = s @ z
        beta = new / square
        ritz = state.ritz.told(alpha, beta)
        ahead = state.radau - alpha
        # At the boundary nothing is conjugate, and nothing is known along negative curvature.
        return _State(
            p=p,
            image=image,
            bent=bent,
            s=s,
            d=beta * d - z,
            square=new,
            gone=state.gone + t * (2 * square - t * curvature),
            flat=jnp.where(ended, jnp.where(lost, jnp.inf, 1), state.flat / (state.flat + beta)),
            radau=jnp.where(~ended & (ahead > 0), ahead / (floor * ahead + beta), 1 / floor),
            ritz=jax.tree.map(lambda old, new: jnp.where(ended, old, new), state.ritz, ritz),
            ended=ended,
            step=state.step + 1,
        )

    s = free(g)
    z, zero = s / model.scale, jnp.zeros_like(s)
    first = s @ z
    start = _State(
        p=zero,
        image=jnp.zeros_like(model.r),
        bent=zero,
        s=s,
        d=-z,
        square=first,
        gone=jnp.zeros_like(first),
        flat=jnp.ones_like(first),
        radau=1 / floor,
        ritz=Ritz.nothing(first),
        ended=jnp.array(False),
        step=jnp.array(0, jnp.result_type(int)),
    )
    end = jax.lax.while_loop(unfinished, body, start)
    return Truncated(end.p, end.gone, *rest(end), end.ritz, end.step)
