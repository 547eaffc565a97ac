"""Inexact Newton: truncated conjugate gradients on Hessian products that are themselves solves."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from tolerax.contracts import Evaluation, Query, Start, Work, product
from tolerax.inner.metric import definite_norm
from tolerax.solvers._common import Geometry
from tolerax.solvers._search import IntervalSearch
from tolerax.solvers._search_state import Answer, Direction, Incumbent, SearchState

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]
# Directions of conjugate gradients that new ones are made conjugate to, and the part of the squared
# residual along them at which they are given up.
KEPT, LOST = 16, 0.3


class NewtonModel(eqx.Module):
    """What the next direction is made from.

    - `radius`: the length up to which the quadratic model is trusted; infinite until a step had to
      be shortened. `length`: of the last step that was accepted; infinite before the first.
    - `measure`: the norm of the gradient at the last incumbent, `forcing` what was asked there.
    - `moved`, `change`: the last step and the change of the gradient along it.
    - `products`: products with the Hessian, `negative` how many directions ended on negative
      curvature, `work` what the products took.
    """

    radius: Scalar
    length: Scalar
    measure: Scalar
    forcing: Scalar
    moved: Vector
    change: Vector
    products: Int[Array, ""]
    negative: Int[Array, ""]
    work: Work


class Truncated(NamedTuple):
    """The answer of truncated conjugate gradients, in the metric: `d` and `R d`, the residual that
    is left of the gradient, whether the curvature was negative, products and their work."""

    d: Vector
    residual: Scalar
    negative: Bool[Array, ""]
    products: Int[Array, ""]
    work: Work


class Directions(NamedTuple):
    """The last directions p of conjugate gradients with `R p`, `H p` and `p.H p`. Products that are
    inexact lose the conjugacy that the short recurrence rests on: new directions are made
    conjugate to all of these. A curvature of infinity leaves one out."""

    p: Float[Array, "k n"]
    dual_p: Float[Array, "k n"]
    hp: Float[Array, "k n"]
    curvature: Float[Array, " k"]

    @classmethod
    def none(cls, like: Vector) -> "Directions":
        zero = jnp.zeros((KEPT, like.size), like.dtype)
        return cls(zero, zero, zero, jnp.full(KEPT, jnp.inf, like.dtype))

    def add(self, step: Array, *new: Array) -> "Directions":
        return Directions(*(a.at[step % KEPT].set(b) for a, b in zip(self, new, strict=True)))

    def conjugate(self, s: Vector, r: Vector) -> tuple[Vector, Vector]:
        """The part of s that is conjugate to them, and R times it for `r = R s`."""
        weights = -(self.hp @ s) / self.curvature
        return s + weights @ self.p, r + weights @ self.dual_p


class InexactNewton(IntervalSearch):
    """Newton's method with truncated conjugate gradients, for inexact values, gradients and Hessian
    products.

    A direction d is found by `(H + lam R) d = -z` to a relative residual that follows the gradient
    (Eisenstat and Walker); H comes as products, for nested problems by two linear solves each, with
    a tolerance of their own; R is the metric of the problem, in which the conjugate gradients are
    preconditioned. So iteration counts do not depend on a grid, and no matrix is ever formed. On
    the way the tolerances of state and adjoint are adapted as in [`InexactLineSearch`][], with the
    same tests on intervals of values; bounds are kept by projection, and variables that are at a
    bound, or would be there after the step, are held (two-metric projection).

    The model is trusted up to a radius: `lam = |z| / radius`, which keeps steps within it where H
    is positive semidefinite. It is infinite until a step has to be shortened and grows again while
    steps are as good as the gradient promises. Where the curvature is negative the step follows it,
    up to the radius or ten times the last step.

    - `rtol`, `atol`, `accuracy`, `share`, `adaptive`, `first_step`: as of [`InexactLineSearch`][].
    - `forcing`: the largest relative residual of the Newton equation. A small one (1e-10) solves a
      linear-quadratic problem in one step.
    - `hessian_share`: relative tolerance of the linear solves in the first Hessian product, over
      that of the Newton equation; later ones may be looser by as much as its residual has fallen,
      and are tighter by 10 after every loss of conjugacy.
      With `adaptive=False` the tolerance of all.
    - `gauss_newton`: use the positive semidefinite part of the Hessian where the problem has one.
    - `max_products`: the most products for one direction.

    Sources: Eisenstat and Walker (*SIAM J. Sci. Comput.* 17, 1996); Steihaug (*SIAM J. Numer.
    Anal.* 20, 1983) for negative curvature; Simoncini and Szyld (*SIAM J. Sci. Comput.* 25, 2003)
    for products that may be looser; Notay (*SIAM J. Sci. Comput.* 22, 2000) for directions made
    conjugate to several before them; Bertsekas (*SIAM J. Control Optim.* 20, 1982) for the
    projection; the regularization by the gradient over an adapted radius, and the test by which it
    grows, are those of gradient-normalized smoothness (arXiv 2506.13710), which begins with
    radius 1 and solves again where we shorten the step.

    >>> import jax.numpy as jnp, tolerax
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solver = tolerax.InexactNewton()
    >>> tolerax.solve(tolerax.Objective(rosenbrock), solver, jnp.array([-1.2, 1.0])).x.round(5)
    Array([1., 1.], dtype=float64)
    """

    forcing: float = 0.5
    hessian_share: float = 0.01
    gauss_newton: bool = eqx.field(static=True, default=False)
    max_products: int = 200

    derivatives = 2
    patient = True

    def __check_init__(self):
        for name in ("forcing", "hessian_share"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not 0 < value < 1:
                raise ValueError(f"{name} is {value}: it must lie between 0 and 1.")

    def init(self, start: Start) -> SearchState:
        if self.gauss_newton:
            like: Evaluation = start.answer(
                Query(start.x, self.accuracy, start.carry, derivatives=2)
            )
            if not hasattr(like.hessian, "gauss_newton"):
                raise ValueError(
                    "gauss_newton is True, but this problem has no Gauss-Newton operator: leave it "
                    "out, or use a problem made of residuals (`LeastSquares`) or of an equation."
                )
        return super().init(start)

    @property
    def uses_hessian(self) -> bool:
        return True

    def work(self, state: SearchState) -> Work:
        return state.model.work

    def record(self, state: SearchState) -> dict[str, Array]:
        model = state.model
        radius = jnp.minimum(model.radius, jnp.finfo(model.radius.dtype).max)
        return super().record(state) | {"products": model.products, "radius": radius}

    # -- what the search asks for -----------------------------------------------------------------

    def _new_model(self, x: Vector) -> NewtonModel:
        inf, zero, count = jnp.array(jnp.inf, x.dtype), jnp.zeros_like(x), jnp.array(0, jnp.int32)
        forcing = jnp.asarray(self.forcing, x.dtype)
        return NewtonModel(inf, inf, inf, forcing, zero, zero, count, count, Work())

    def _direction(self, state: SearchState, z: Vector, free: Array, answer: Answer) -> Direction:
        now, geometry, model = state.now, answer.geometry, state.model
        operator = answer.hessian
        if operator is None:
            raise TypeError(
                "InexactNewton needs Hessian products, and this problem answers with none: use "
                "`InexactLineSearch`."
            )
        if self.gauss_newton:
            operator = operator.gauss_newton()
        g = jnp.where(free, geometry.riesz(z), 0)
        measure = geometry.dual(z)
        forcing = self._forcing(state, measure)
        # What a gradient step takes to its bound goes there, the rest moves by Newton's equation.
        held, to_bound = _held(state, g, free)
        inside = free & ~held
        # A gradient that is mostly error is not worth a product.
        ready = now.z_error <= 0.3 * measure
        going = ready & ~state.done & ~state.restarted
        lam = measure / model.radius
        longest = jnp.maximum(jnp.minimum(measure, 1.0), 0.01 * geometry.norm(now.x))
        longest = jnp.where(jnp.isfinite(model.length), 10 * model.length, longest)
        found = jax.lax.cond(
            going,
            lambda: self._truncated(
                operator,
                jnp.where(inside, z, 0),
                inside,
                lam,
                forcing,
                jnp.minimum(longest, model.radius),
                geometry,
            ),
            lambda: Truncated(
                -g, measure, jnp.array(False), jnp.zeros_like(model.products), Work()
            ),
        )
        h = jnp.where(going & held, to_bound, -found.d)
        known = jnp.all(jnp.isfinite(h)) & (jnp.dot(z, h) > 0)
        h = jnp.where(known, h, g)
        new = eqx.tree_at(
            lambda m: (m.forcing, m.measure, m.products, m.negative, m.work),
            model,
            (
                jnp.where(going, forcing, model.forcing),
                jnp.where(going, measure, model.measure),
                model.products + found.products,
                model.negative + found.negative,
                model.work + found.work,
            ),
        )
        fresh = state.restarted | ~known
        return Direction(h, fresh, ready, forcing * measure, new)

    def _forcing(self, state: SearchState, measure: Scalar) -> Scalar:
        """The relative residual to be left of the Newton equation."""
        enough = 0.5 * self._tolerance(state) / jnp.where(measure > 0, measure, 1)
        by_progress = jnp.sqrt(measure / jnp.where(state.scale > 0, state.scale, 1))
        eta = jnp.minimum(self.forcing, by_progress)
        return jnp.clip(jnp.maximum(eta, enough), 1e-14, 0.5).astype(measure.dtype)

    def _truncated(
        self,
        operator: Any,
        z: Vector,
        free: Array,
        lam: Scalar,
        forcing: Scalar,
        longest: Scalar,
        geometry: Geometry,
    ) -> Truncated:
        """Conjugate gradients on `(H + lam R) d = -z` over the free variables, preconditioned by
        R^-1. R times a direction is a sum of residuals: R itself is never applied."""
        unravel = geometry.box.unravel
        inner = lambda r: jnp.where(free, geometry.riesz(r), 0)  # noqa: E731
        s = inner(-z)
        size = definite_norm(-z, s)
        zero, tiny, eps = jnp.zeros_like(z), jnp.finfo(z.dtype).tiny, jnp.finfo(z.dtype).eps
        shape = jax.eval_shape(lambda: product(operator, unravel(z), forcing).work)
        no_work = jax.tree.map(lambda n: jnp.zeros(n.shape, n.dtype), shape)

        def unfinished(loop: tuple) -> Bool[Array, ""]:
            _, _, _, _, _, rs, step, negative, *_ = loop
            left = jnp.sqrt(jnp.maximum(rs, 0)) > forcing * size
            return left & ~negative & (step < self.max_products)

        def body(loop: tuple) -> tuple:
            d, dual_d, r, p, dual_p, rs, step, _, work, kept, losses = loop
            share = jnp.asarray(self.hessian_share, rs.dtype)
            if self.adaptive:
                # What is left of the residual weighs the error of a product: it may grow.
                left = jnp.sqrt(rs) / jnp.where(size > 0, size, 1)
                share = jnp.minimum(share * forcing / left, jnp.maximum(share, 0.1))
                share = jnp.maximum(share * 0.1**losses, 4 * eps)
            times = product(operator, unravel(p), share)
            hp = jnp.where(free, ravel_pytree(times.vector)[0], 0).astype(p.dtype)
            hp = hp + lam * dual_p
            curvature, pp = jnp.dot(p, hp), jnp.dot(p, dual_p)
            negative = ~(curvature > 0)
            # Along negative curvature as far as the model is trusted: the root of |d + t p|.
            dp, dd = jnp.dot(p, dual_d), jnp.dot(d, dual_d)
            room = jnp.maximum(longest**2 - dd, 0)
            root = room / (dp + jnp.sqrt(jnp.maximum(dp**2 + pp * room, 0)) + tiny)
            alpha = jnp.where(negative, root, jnp.dot(p, r) / jnp.where(negative, 1, curvature))
            alpha = jnp.where(jnp.isfinite(curvature), alpha, 0)
            d, dual_d, r = d + alpha * p, dual_d + alpha * dual_p, r - alpha * hp
            s = inner(r)
            rs_new = jnp.dot(r, s)
            kept = kept.add(step, p, dual_p, hp, jnp.where(negative, 1, curvature))
            p, dual_p = kept.conjugate(s, r)
            # r is orthogonal to the directions so far, up to errors of products: where these are
            # not small, begin again from here with products that are ten times as accurate.
            lost = jnp.abs(jnp.dot(p, r) - rs_new) > LOST * rs_new
            p, dual_p = jnp.where(lost, s, p), jnp.where(lost, r, dual_p)
            kept = kept._replace(curvature=jnp.where(lost, jnp.inf, kept.curvature))
            return (
                d,
                dual_d,
                r,
                p,
                dual_p,
                rs_new,
                step + 1,
                negative,
                work + times.work,
                kept,
                losses + lost,
            )

        start = (
            zero,
            zero,
            -z,
            s,
            -z,
            size**2,
            jnp.array(0, jnp.int32),
            jnp.array(False),
            no_work,
            Directions.none(z),
            jnp.array(0, jnp.int32),
        )
        d, _, _, _, _, rs, steps, negative, work, *_ = jax.lax.while_loop(unfinished, body, start)
        return Truncated(d, jnp.sqrt(jnp.maximum(rs, 0)), negative, steps, work)

    def _learned(
        self, state: SearchState, told: Incumbent, keep: Array, gain: Array, geometry: Geometry
    ) -> NewtonModel:
        del keep
        model, moved = state.model, told.x - state.now.x
        length = geometry.norm(moved)
        # As good as the gradient promises: f - f_new >= |z_new|^2 / (8 lam).
        after = geometry.stationarity(told.x, told.z)
        lam = model.measure / model.radius
        good = 8 * lam * gain >= after**2
        longer = jnp.where(good | (after <= 0.5 * model.measure), 4.0, 1.0) * jnp.maximum(
            model.radius, length
        )
        cut = (state.step < 0.99) & ~state.restarted
        radius = jnp.where(cut, length, longer)
        # Beyond all that matters the term is dropped.
        radius = jnp.where(
            lam <= 1e-8 * jnp.abs(_rayleigh(moved, told.z - state.now.z, length)),
            jnp.where(cut, radius, jnp.inf),
            radius,
        )
        return eqx.tree_at(
            lambda m: (m.radius, m.length, m.moved, m.change),
            model,
            (radius, length, moved, told.z - state.now.z),
        )

    def _forgotten(self, state: SearchState) -> tuple[NewtonModel, Bool[Array, ""]]:
        length = state.step * jnp.ones_like(state.model.radius)
        radius = jnp.where(jnp.isfinite(state.model.length), state.model.length, length)
        return eqx.tree_at(lambda m: m.radius, state.model, radius), jnp.array(True)

    def _last(self, model: NewtonModel) -> tuple[Vector, Vector]:
        return model.moved, model.change


def _rayleigh(moved: Vector, change: Vector, length: Scalar) -> Scalar:
    """The mean curvature along a step, in the metric."""
    return jnp.dot(moved, change) / jnp.where(length > 0, length**2, 1)


def _held(state: SearchState, g: Vector, free: Array) -> tuple[Array, Vector]:
    """Which variables lie so near to a bound that a small part of a gradient step takes them there,
    and the way back from the bound to them."""
    x, box = state.now.x, state.box
    near = 1e-3 * jnp.max(jnp.abs(x - box.clip(x - g)))
    width = jnp.minimum(near, 1e-3 * (box.upper - box.lower))
    below = free & (x - box.lower <= width) & (g > 0)
    above = free & (box.upper - x <= width) & (g < 0)
    to_bound = jnp.where(below, x - box.lower, jnp.where(above, x - box.upper, 0))
    return below | above, to_bound
