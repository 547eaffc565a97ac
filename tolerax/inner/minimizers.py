"""Minimizers of smooth strongly convex functions that stop on a certified distance.

Each is called as `minimizer(lower, y, tolerance)` with a [`Smooth`][] function, a guess and an
absolute tolerance on `|y - y*|_H`, and returns a [`LowerResult`][].
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from tolerax.inner.bounds import at_least, decrement_for, distance, dual_norm, excess
from tolerax.inner.krylov import CG
from tolerax.inner.lbfgs import add_pair, inverse_product, no_pairs
from tolerax.inner.metric import definite_norm
from tolerax.inner.recycled import Recycled
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class Smooth(eqx.Module):
    """A smooth function h of a vector with what is known of it.

    - `value(y)`: h(y).
    - `lower_bound`: diagonal D with Hessian >= D everywhere.
    - `self_concordance`: M with `|D^3 h[u, u, v]| <= M |v|_2 u'Hu`; 0 for a quadratic.
    - `preconditioner(y)`: what resembles the Hessian, a diagonal or a callable `r -> P^-1 r`, or
      `None`.
    - `along(v)`: N(v) with `|D^3 h[u, u, v]| <= N(v) u'Hu`, sharper than M |v|_2, or `None`.
    - `memory`: what earlier linear solves taught about the Hessian, or `None`.
    """

    value: Callable[[Vector], Scalar]
    lower_bound: Vector
    self_concordance: Scalar
    preconditioner: Callable[[Vector], Vector | Callable[[Vector], Vector]] | None = None
    along: Callable[[Vector], Scalar] | None = None
    memory: Recycled | None = None

    def bend(self, v: Vector) -> Scalar:
        """How much the Hessian can change along v: H(y + v) is at most exp(bend) H(y)."""
        by_length = self.self_concordance * jnp.linalg.norm(v)
        return by_length if self.along is None else jnp.minimum(by_length, self.along(v))

    def value_and_gradient(self, y: Vector) -> tuple[Scalar, Vector]:
        """h(y) and its gradient."""
        return jax.value_and_grad(self.value)(y)

    def hessian(self, y: Vector) -> Callable[[Vector], Vector]:
        """Hessian products at y; what depends on y alone is computed once."""
        return jax.linearize(jax.grad(self.value), y)[1]

    def resembling(self, y: Vector) -> Vector | Callable[[Vector], Vector] | None:
        """The preconditioner at y."""
        return None if self.preconditioner is None else self.preconditioner(y)

    def inverse(self, y: Vector) -> Callable[[Vector], Vector] | None:
        """The inverse of the preconditioner at y."""
        given = self.resembling(y)
        return given if given is None or callable(given) else lambda r: r / given

    def distance(
        self, r: Vector, rounding: Scalar, decrement: ArrayLike = jnp.inf
    ) -> tuple[Scalar, Scalar]:
        """Bounds on `|y - y*|_H` and `M |y - y*|_2` from the gradient r at y, which is wrong by at
        most `rounding` in the dual norm."""
        r_dual = dual_norm(r, self.lower_bound) + rounding
        d, m = self.lower_bound, self.self_concordance
        return distance(jnp.asarray(decrement) + rounding, r_dual, d, m)

    def decrement_for(self, tolerance: ArrayLike) -> Scalar:
        """The Newton decrement that is enough for a distance of `tolerance`."""
        return decrement_for(jnp.asarray(tolerance), self.lower_bound, self.self_concordance)

    def rounding(self, y: Vector, largest: Scalar) -> Scalar:
        """What rounding leaves of gradients at y, in the dual norm: about eps |H| |y|, where
        `largest` is the largest curvature seen."""
        size = jnp.finfo(y.dtype).eps * largest * jnp.linalg.norm(y)
        return size / jnp.sqrt(jnp.min(self.lower_bound))


class LowerResult(eqx.Module):
    """The answer of a lower-level solve.

    - `residual`: the gradient at `y`; `distance`: bound on `|y - y*|_H`; `exponent`: bound on
      `M |y - y*|_2`, which says how much the Hessian can change on the way to the solution.
    - `gradients`, `products`: work. `status`: a `PointStatus`.
    - `third`: a lower bound on M, from how the gradient changed along Newton steps (0 if none);
      `bent`: the same over what [`Smooth.bend`][] allows: above 1 it contradicts that.
    - `curvature`: bound on the smallest eigenvalue of D^-1 H seen: below 0.99 it contradicts D.
    - `rounding`: what rounding may have added to the residual, in the dual norm.
    - `memory`: that of the function, with what linear solves on the way taught it.
    """

    y: Vector
    residual: Vector
    distance: Scalar
    exponent: Scalar
    gradients: Int[Array, ""]
    products: Int[Array, ""]
    status: Any
    third: Scalar
    bent: Scalar
    curvature: Scalar
    rounding: Scalar
    memory: Recycled | None = None


class Limit(NamedTuple):
    """When a solve may stop short of its tolerance.

    - `effort`: after about so many gradients and products.
    - `hopeless(y, distance)`: whether a point at most `distance` from the solution, in the energy
      norm, says enough already. Newton's method asks after every step.
    """

    effort: ArrayLike = jnp.inf
    hopeless: Callable[[Vector, Scalar], Bool[Array, ""]] | None = None


NO_LIMIT = Limit()


class Minimizer(eqx.Module):
    """A minimizer of smooth strongly convex functions."""

    @abc.abstractmethod
    def __call__(
        self, lower: Smooth, y: Vector, tolerance: ArrayLike, limit: Limit = NO_LIMIT
    ) -> LowerResult:
        """Minimize from the guess `y` until `|y - y*|_H <= tolerance` is certain, or until the
        limit."""


def _outcome(reached: Array, floored: Array, finite: Array) -> Any:
    status = PointStatus.where(floored, PointStatus.floor, PointStatus.inaccurate)
    status = PointStatus.where(reached, PointStatus.ok, status)
    return PointStatus.where(finite, status, PointStatus.failed)


def _decreased(h: Scalar, h_new: Scalar, slope: Scalar, slope_new: Scalar) -> Bool[Array, ""]:
    """Whether a step decreased a convex h enough; both slopes are along the whole step.

    Convexity gives `h_new <= h + slope_new`, so a slope that is still negative proves a decrease
    without looking at the values, which have no digits left close to the minimum.
    """
    flat = jnp.abs(h_new - h) <= 1e3 * jnp.finfo(h.dtype).eps * jnp.abs(h)
    flatter = flat & (jnp.abs(slope_new) <= 0.9 * jnp.abs(slope))
    return (slope_new <= 0) | (h_new <= h + 1e-4 * slope) | flatter


def _largest(largest: Scalar, change: Vector, moved: Vector, y: Vector) -> Scalar:
    """The largest curvature seen, given that the gradient changed over a step from y."""
    size = jnp.linalg.norm(moved)
    # The change over a tiny step is made of rounding.
    visible = size > jnp.sqrt(jnp.finfo(y.dtype).eps) * jnp.linalg.norm(y)
    seen = jnp.linalg.norm(change) / jnp.where(visible, size, 1)
    return jnp.where(visible & jnp.isfinite(seen), jnp.maximum(largest, seen), largest)


class NewtonCG(Minimizer):
    """Newton's method with conjugate gradients, backtracking on values.

    The Newton step that certifies a point is also the next iterate: with `H d = -r` solved up to an
    energy error e_d (Gauss-Radau), the gradient at y + d obeys
    `|grad h(y + d)|_{H^-1} <= e_d + |third-order part|`, and the third-order part is bounded by
    self-concordance or by its own measured size. So the distance of the returned point is certified
    without a solve of its own.

    - `forcing`: relative accuracy of a Newton step that is not the last; less where the function is
      known to be almost quadratic, so that a quadratic takes one step. Far from the minimum the
      model is wrong by more than a third anyway.
    - `max_steps`, `max_cg_steps`: the most Newton steps and CG iterations a step.
    """

    forcing: float = 0.3
    max_steps: int = 200
    max_cg_steps: int = 1000

    def __call__(
        self, lower: Smooth, y: Vector, tolerance: ArrayLike, limit: Limit = NO_LIMIT
    ) -> LowerResult:
        d_bound = lower.lower_bound
        tolerance = jnp.asarray(tolerance, y.dtype)
        eps = jnp.finfo(y.dtype).eps
        count = jnp.result_type(int)
        h, r = lower.value_and_gradient(y)
        largest = jnp.max(d_bound)
        t, a = lower.distance(r, lower.rounding(y, largest))
        wanted = lower.decrement_for(tolerance)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            y, h, _, t, _, step, gradients, products, stuck, *_ = state
            going = (t > tolerance) & (step < self.max_steps) & (stuck < 2) & jnp.isfinite(h)
            if limit.hopeless is not None:
                going = going & ~limit.hopeless(y, t)
            return going & (gradients + products < limit.effort)

        def newton(state: tuple) -> tuple:
            y, h, r, t, a, step, gradients, products, stuck, third, bent, *seen = state
            curvature, largest, memory, _ = seen
            operator = lower.hessian(y)
            left = jnp.maximum(limit.effort - gradients - products, 1)
            solve = CG(jnp.minimum(left, self.max_cg_steps).astype(count))(
                operator,
                -r,
                lower_bound=d_bound,
                tolerance=0.5 * wanted,
                relative=jnp.minimum(self.forcing, excess(a)),
                preconditioner=lower.resembling(y),
                exact_residual=False,
                memory=memory,
            )
            d, hd = solve.x, -r - solve.residual
            dhd = jnp.maximum(jnp.dot(d, hd), 0)
            slope = jnp.dot(r, d)
            visible = 1e3 * eps * jnp.abs(h)

            def backtrack(trial: tuple) -> tuple:
                s, _, gradient, tries = trial
                # To where a line through both slopes vanishes; a tenth where there is none.
                share = jnp.clip(slope / (slope - jnp.dot(gradient, d)), 0.1, 0.5)
                shorter = s * jnp.where(jnp.isnan(share), 0.1, share)
                s = jnp.where(tries > 0, shorter, s)
                return s, *lower.value_and_gradient(y + s * d), tries + 1

            def too_long(trial: tuple) -> Bool[Array, ""]:
                s, value, gradient, tries = trial
                slope_there = jnp.dot(gradient, d)
                low_enough = _decreased(h, value, s * slope, s * slope_there)
                # A step that climbs half as steeply as it fell at first went far beyond.
                beyond = (slope_there > 0.5 * jnp.abs(slope)) & (jnp.abs(value - h) > visible)
                return (tries == 0) | ((~low_enough | beyond) & (tries < 30))

            zero = jnp.array(0, count)
            one = jnp.ones((), y.dtype)
            s, h_new, r_new, tries = jax.lax.while_loop(too_long, backtrack, (one, h, r, zero))
            full = s == 1
            # What the linear model of the gradient missed, and bounds on its dual norm.
            left = solve.residual  # -(r + H d)
            missed = r_new + left
            d_norm = jnp.linalg.norm(d)
            b = lower.bend(d)
            largest = jnp.maximum(largest, solve.largest)
            rounding = lower.rounding(y + s * d, largest)
            by_constant = excess(b) * jnp.sqrt(dhd)
            by_size = dual_norm(missed, d_bound)
            dual = solve.error + jnp.minimum(by_constant, by_size)
            # From the norm of H(y) to that of H(y + d).
            growth = jnp.where(dual > 0, jnp.exp(0.5 * b), 1)
            t_new, a_new = lower.distance(r_new, rounding, jnp.where(full, dual * growth, jnp.inf))
            # d'(G - H)d <= excess(bend) d'Hd, with what rounding may have added taken off.
            noise = 8 * eps * largest * (jnp.linalg.norm(y) + d_norm) * d_norm
            ratio = (jnp.abs(jnp.dot(missed, d)) - noise) / jnp.where(dhd > 0, dhd, jnp.inf)
            certain = full & (ratio > 0) & jnp.isfinite(ratio)
            least = at_least(jnp.where(certain, ratio, 0))
            third = jnp.maximum(third, least / jnp.where(certain, d_norm, 1))
            bent = jnp.maximum(bent, jnp.where(certain, least / b, 0))
            floored = full & (dual <= rounding)
            lost = solve.error == jnp.inf
            no_gain = (t_new > 0.5 * t) & full & (d_norm <= 1e3 * eps * (1 + jnp.linalg.norm(y)))
            return (
                y + s * d,
                h_new,
                r_new,
                t_new,
                a_new,
                step + 1,
                gradients + tries,
                products + solve.products,
                stuck + 2 * floored + (no_gain | lost),
                third,
                bent,
                jnp.minimum(curvature, solve.curvature),
                largest,
                solve.memory,
                lost,
            )

        zero = jnp.array(0, count)
        nothing = jnp.zeros((), y.dtype)
        seen = (nothing, nothing, nothing + jnp.inf, largest, lower.memory, jnp.array(False))
        start = (y, h, r, t, a, zero, zero + 1, zero, zero, *seen)
        end = jax.lax.while_loop(unfinished, newton, start)
        y, h, r, t, a, _, gradients, products, stuck, third, bent = end[:11]
        curvature, largest, memory, lost = end[11:]
        finite = jnp.isfinite(h) & jnp.all(jnp.isfinite(r))
        # Where h is not a number its gradient may well be one.
        t = jnp.where(finite, t, jnp.inf)
        # Without an answer of the linear solves it was not rounding that ended the steps.
        status = _outcome(t <= tolerance, (stuck >= 2) & ~lost, finite)
        rounding = lower.rounding(y, largest)
        return LowerResult(
            y, r, t, a, gradients, products, status, third, bent, curvature, rounding, memory
        )


class LBFGS(Minimizer):
    """Limited-memory BFGS; certifies by strong convexity, `|y - y*|_D <= |grad h(y)|_{D^-1}`.

    A preconditioner takes the place of the identity that the inverse Hessian is built from. With a
    good one it suits smoothed kinks, where most Newton steps are too long.

    - `memory`: pairs kept. `max_steps`: the most gradients.
    """

    memory: int = eqx.field(static=True, default=10)
    max_steps: int = 2000

    def __call__(
        self, lower: Smooth, y: Vector, tolerance: ArrayLike, limit: Limit = NO_LIMIT
    ) -> LowerResult:
        count = jnp.result_type(int)
        h, r = lower.value_and_gradient(y)
        everywhere = jnp.ones(y.shape, bool)

        def unfinished(state: tuple) -> Bool[Array, ""]:
            y, h, r, _, _, step, stuck, largest = state
            going = _worthwhile(lower, y, r, largest, tolerance)
            most = jnp.minimum(limit.effort, self.max_steps)
            return going & (step < most) & (stuck < 3) & jnp.isfinite(h)

        def trial(state: tuple) -> tuple:
            y, h, r, pairs, s, step, stuck, largest = state
            inverse = lower.inverse(y)
            p = -inverse_product(pairs, r, everywhere, inverse or (lambda v: v))
            # Without a preconditioner nothing is known of the length of the first step.
            blind = (pairs.count == 0) & (inverse is None)
            scale = jnp.where(blind, 1 / jnp.maximum(jnp.linalg.norm(r), 1), 1)
            moved = s * scale * p
            h_new, r_new = lower.value_and_gradient(y + moved)
            slope = jnp.dot(r, moved)
            good = _decreased(h, h_new, slope, jnp.dot(r_new, moved))
            largest = _largest(largest, r_new - r, moved, y)
            extended = add_pair(pairs, moved, r_new - r)
            choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(good, x, y), a, b)  # noqa: E731
            y, h, r, pairs = choose((y + moved, h_new, r_new, extended), (y, h, r, pairs))
            # Steps that rounding takes away lead nowhere, whatever becomes of the slope.
            still = jnp.linalg.norm(moved) <= 4 * jnp.finfo(y.dtype).eps * jnp.linalg.norm(y)
            stuck = jnp.where(still | (~good & (s < 1e-10)), stuck + 1, jnp.where(good, 0, stuck))
            # After a hopeless search the memory is dropped.
            drop = ~good & (s < 1e-10)
            pairs = jax.tree.map(lambda x: jnp.where(drop, jnp.zeros_like(x), x), pairs)
            s = jnp.where(good | drop, 1.0, 0.4 * s)
            return y, h, r, pairs, s, step + 1, stuck, largest

        zero = jnp.array(0, count)
        one, largest = jnp.ones((), y.dtype), jnp.max(lower.lower_bound)
        start = (y, h, r, no_pairs(self.memory, y), one, zero, zero, largest)
        y, h, r, _, _, steps, stuck, largest = jax.lax.while_loop(unfinished, trial, start)
        stuck, inverse = stuck >= 3, lower.inverse(y)
        if inverse is not None:
            # A preconditioner of the wrong sign leads nowhere: that is not rounding.
            stuck = stuck & jnp.isfinite(definite_norm(r, inverse(r)))
        return _from_gradient(lower, y, h, r, largest, tolerance, steps + 1, stuck)


class AcceleratedGradient(Minimizer):
    """Accelerated gradient descent with backtracking and adaptive restart (O'Donoghue and Candes,
    *Foundations of Computational Mathematics* 15, 2015); certifies like [`LBFGS`][].

    - `max_steps`: the most gradients.
    """

    max_steps: int = 10_000

    def __call__(
        self, lower: Smooth, y: Vector, tolerance: ArrayLike, limit: Limit = NO_LIMIT
    ) -> LowerResult:
        eps = jnp.finfo(y.dtype).eps
        count = jnp.result_type(int)
        h, r = lower.value_and_gradient(y)
        norm = jnp.linalg.norm(r)
        smooth = jnp.maximum(norm / (1 + jnp.linalg.norm(y)), jnp.max(lower.lower_bound))

        def unfinished(state: tuple) -> Bool[Array, ""]:
            y, _, h, r, _, _, step, stuck, largest = state
            going = _worthwhile(lower, y, r, largest, tolerance)
            most = jnp.minimum(limit.effort, self.max_steps)
            return going & (step < most) & (stuck < 60) & jnp.isfinite(h)

        def trial(state: tuple) -> tuple:
            # y is the point of the last gradient r; last is the previous step's end.
            y, last, h, r, smooth, momentum, step, stuck, largest = state
            end = y - r / smooth
            grown = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
            ahead = end + (momentum - 1) / grown * (end - last)
            # Momentum against the gradient is dropped.
            restart = jnp.dot(r, end - last) > 0
            ahead = jnp.where(restart, end, ahead)
            grown = jnp.where(restart, 1.0, grown)
            h_new, r_new = lower.value_and_gradient(ahead)
            # L is large enough when gradients change by at most L times the distance.
            change, moved = jnp.linalg.norm(r_new - r), jnp.linalg.norm(ahead - y)
            fits = change <= smooth * moved * (1 + 1e-6) + 64 * eps * norm
            steeper = jnp.where(jnp.isfinite(change), change / moved, 0)
            grow = lambda: (y, last, h, r, jnp.maximum(2 * smooth, steeper), momentum)  # noqa: E731
            go = lambda: (ahead, end, h_new, r_new, smooth * 0.999, grown)  # noqa: E731
            new = jax.tree.map(lambda a, b: jnp.where(fits, a, b), go(), grow())
            still = jnp.linalg.norm(new[0] - y) <= 4 * eps * jnp.linalg.norm(y)
            largest = _largest(largest, r_new - r, ahead - y, y)
            return *new, step + 1, jnp.where(still, stuck + 1, 0), largest

        zero = jnp.array(0, count)
        one, largest = jnp.ones((), y.dtype), jnp.max(lower.lower_bound)
        start = (y, y, h, r, smooth, one, zero, zero, largest)
        y, _, h, r, _, _, steps, stuck, largest = jax.lax.while_loop(unfinished, trial, start)
        return _from_gradient(lower, y, h, r, largest, tolerance, steps + 1, stuck >= 60)


def _worthwhile(
    lower: Smooth, y: Vector, r: Vector, largest: Scalar, tolerance: ArrayLike
) -> Bool[Array, ""]:
    """Whether the tolerance is not reached and the gradient is more than rounding."""
    rounding = lower.rounding(y, largest)
    far = lower.distance(r, rounding)[0] > tolerance
    return far & (dual_norm(r, lower.lower_bound) > rounding)


def _from_gradient(
    lower: Smooth,
    y: Vector,
    h: Scalar,
    r: Vector,
    largest: Scalar,
    tolerance: ArrayLike,
    gradients: Array,
    stuck: Array,
) -> LowerResult:
    rounding = lower.rounding(y, largest)
    t, a = lower.distance(r, rounding)
    stuck = stuck | (dual_norm(r, lower.lower_bound) <= rounding)
    finite = jnp.isfinite(h) & jnp.all(jnp.isfinite(r))
    t = jnp.where(finite, t, jnp.inf)
    zero = jnp.array(0, jnp.result_type(int))
    return LowerResult(
        y,
        r,
        t,
        a,
        gradients,
        zero,
        _outcome(t <= tolerance, stuck, finite),
        jnp.zeros((), y.dtype),
        jnp.zeros((), y.dtype),
        jnp.full((), jnp.inf, y.dtype),
        rounding,
        lower.memory,
    )
