"""Nonlinear least squares in lanes by products with the Jacobian, which is never formed."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.inner.cgls import Model, truncated
from tolerax.inner.lane_blocks import in_blocks
from tolerax.inner.lanes import PATIENCE, Terms
from tolerax.inner.levenberg_marquardt import LeastSquaresResult, prepared
from tolerax.inner.residuals import Structured, structured
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]
Flag = Bool[Array, ""]
Count = Int[Array, ""]
Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]

# Groups of rows that the lengths of columns are estimated from, a product each.
GROUPS = 16
# The largest share of the distance that a step leaves to the next one.
FORCING = 0.03


class GaussNewtonCG(eqx.Module):
    """Gauss-Newton steps by conjugate gradients, for nonlinear least-squares problems with
    thousands of unknowns, one or many at once.

    It is called as [`BatchedLevenbergMarquardt`][] is, gives the same answer, and takes its place
    in `batched_least_squares(..., solver=GaussNewtonCG(), hessian="cg")`. (With another `hessian`
    the backward solve forms the matrices that this one avoids.) It takes products with J and J'
    only: memory is that of the residuals and of their derivatives, and work grows with the
    condition of J. Where J'J has room and J is ill-conditioned, factoring it is faster.

    Every lane has a trust region, in which conjugate gradients minimize the linear model until what
    is left of the distance is about as large as the error of the model was (Eisenstat, Walker,
    *SIAM J. Sci. Comput.* 17, 1996), both in the energy norm. A lane that converges slowly goes on
    with exact second derivatives, and follows negative curvature to the boundary.

    Variables are scaled with the lengths of the columns of J, which are estimated: rows are put in
    16 groups (the remainder of their index) and given random signs. The squares of the sums over
    the groups add up to the squared lengths, on average; exactly, where rows of the same group have
    no column in common, as in a J with at most 16 diagonals.

    Of the answer

    - `error`, the distance to the minimizer in the energy norm up to second order, is an upper
      bound where there is a ridge and the lane took no second derivatives. Without a ridge it is
      the smaller of a bound, what the linear model leaves of the residuals, and an estimate from
      the least curvature that was seen: it knows nothing of directions that the data hardly
      determine and that the gradient hardly has. With second derivatives it is that estimate too,
      with a ridge or without.
    - `condition`, of J'J + ridge with columns scaled, is an estimate from below; it is infinite
      before the first product.
    - `radius` is that of `|S step|` with the estimated lengths S.

    Options:

    - `max_steps`: the most evaluations of a lane. - `max_products`: the most products with J (and
      as many with J') of its conjugate gradients.
    - `block`, `sharding`: as of [`BatchedLevenbergMarquardt`][]; a block of `None` is one lane at
      a time on CPUs.

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.inner import GaussNewtonCG
    >>> def smooth(u, y):  # exp(u) near y, with small steps from each entry to the next
    ...     return jnp.concatenate([jnp.exp(u) - y, u[1:] - u[:-1]])
    >>> y = 2 + jnp.sin(jnp.arange(6000.0)).reshape(2, 3000)
    >>> found = GaussNewtonCG()(smooth, jnp.zeros((2, 3000)), y)
    >>> bool(jnp.all(found.error <= 1e-8)), bool(jnp.all(found.products < 100))
    (True, True)
    """

    max_steps: int = 200
    max_products: int = 10_000
    block: int | None = eqx.field(static=True, default=None)
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"block is {self.block}: give 1 or more lanes, or None.")
        for name in ("max_steps", "max_products"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1.")

    def __call__(
        self,
        residuals: Any,
        w: Rows,
        data: PyTree = None,
        *,
        tolerance: ArrayLike = 1e-8,
        ridge: ArrayLike = 0.0,
        bounds: tuple[ArrayLike, ArrayLike] | None = None,
        radius: Lane | None = None,
    ) -> LeastSquaresResult:
        """Solve in every lane until the error in the energy norm is at most `tolerance`: see
        [`BatchedLevenbergMarquardt`][] for what is given, and for lanes that fail alone.

        - `radius`: the first radius of the trust region in each lane, infinite by default.
        """
        fun = structured(residuals)
        given = prepared(w, data, tolerance, ridge, bounds, radius)

        def lane(
            data: PyTree, start: Array, terms: Terms, tolerance: Array, radius: Array
        ) -> dict[str, Any]:
            search = _Search(fun, data, terms, tolerance, self.max_steps, self.max_products)
            return search.run(start, radius)

        def run(*lanes: PyTree) -> dict[str, Any]:
            if len(lanes[1]) > 1:
                return jax.vmap(lane)(*lanes)
            # Under `vmap` both branches of a condition are paid for.
            found = lane(*jax.tree.map(lambda leaf: leaf[0], lanes))
            return jax.tree.map(lambda leaf: leaf[None], found)

        return LeastSquaresResult(**in_blocks(run, self.block, self.sharding, data, *given))


class _Progress(eqx.Module):
    """The best point of a lane (`w` with `cost`, `error`, the `distance` to the minimizer as far as
    it is estimated, the `scale` and the length of the gradient, `size`), and the next `trial`:

    - `predicted`: the decrease that the model expects there; `slope`: that of the cost towards it;
      `expected`: the gradient that the model has there.
    - `forcing`: the share of the distance that conjugate gradients may leave.
    - `inverse`, `largest`: of the scaled matrix, one over the smallest eigenvalue and the largest
      one, as far as they were seen.
    - `slow`: takes second derivatives. `active`: goes on. `floored`: rounding ended it.
    """

    w: Vector
    cost: Scalar
    error: Scalar
    distance: Scalar
    scale: Vector
    size: Scalar
    trial: Vector
    predicted: Scalar
    slope: Scalar
    expected: Vector
    radius: Scalar
    forcing: Scalar
    inverse: Scalar
    largest: Scalar
    evaluations: Count
    products: Count
    slow: Flag
    active: Flag
    floored: Flag


class _Search(eqx.Module):
    """The run of one lane."""

    fun: Structured
    data: PyTree
    terms: Terms
    tolerance: Scalar
    max_steps: int
    max_products: int

    def run(self, start: Vector, radius: Scalar) -> dict[str, Any]:
        """From the start to what a `LeastSquaresResult` says of a lane: by the linear model as long
        as that is quick, then with second derivatives."""
        zero, none = jnp.zeros_like(radius), jnp.zeros_like(start)
        inf, false, count = zero + jnp.inf, jnp.array(False), jnp.array(0, jnp.result_type(int))
        now = _Progress(
            w=start,
            cost=inf,
            error=inf,
            distance=inf,
            scale=jnp.ones_like(start),
            size=inf,
            trial=start,
            predicted=inf,
            slope=zero,
            expected=none,
            radius=radius,
            forcing=zero + FORCING,
            inverse=zero,
            largest=zero,
            evaluations=jnp.array(0, jnp.int32),
            products=count,
            slow=false,
            active=~false,
            floored=false,
        )
        now = jax.lax.while_loop(
            lambda now: now.active & ~now.slow, functools.partial(self.step, curved=False), now
        )
        now = jax.lax.while_loop(
            lambda now: now.active, functools.partial(self.step, curved=True), now
        )
        status = PointStatus.where(now.floored, PointStatus.floor, PointStatus.inaccurate)
        status = PointStatus.where(now.error <= self.tolerance, PointStatus.ok, status)
        status = PointStatus.where(jnp.isfinite(now.cost), status, PointStatus.failed)
        return {
            "w": now.w,
            "cost": now.cost,
            "error": now.error,
            "condition": jnp.where(now.inverse > 0, now.inverse * now.largest, jnp.inf),
            "evaluations": now.evaluations,
            "products": now.products,
            "status": status,
            "radius": now.radius,
        }

    def rows(self, w: Vector) -> Float[Array, " m"]:
        """The residuals."""
        return self.fun(w, self.data)

    def cost(self, w: Vector) -> Scalar:
        """What is minimized."""
        r = self.rows(w)
        return 0.5 * (r @ r) + 0.5 * self.terms.ridge * (w @ w)

    def step(self, old: _Progress, curved: bool) -> _Progress:
        """Evaluate the trial, accept it or not, and find the next one; `curved` is with second
        derivatives."""
        eps = jnp.finfo(old.w.dtype).eps
        cost, slopes = jax.value_and_grad(self.cost)(old.trial)
        finite = jnp.isfinite(cost) & jnp.all(jnp.isfinite(slopes))
        first = old.cost == jnp.inf
        gain, noise = old.cost - cost, 16 * eps * old.cost
        # Where costs cannot be told apart, the distance decides, which takes a solve there.
        flat = ~first & (old.predicted <= noise)
        gains = jnp.where(flat, gain >= -noise, first | (gain >= 1e-4 * old.predicted))
        moved = finite & gains
        length = jnp.sqrt(jnp.sum(old.scale * (old.trial - old.w) ** 2))
        radius = _next_radius(old, length, gain, finite, moved)
        radius = jnp.where(first | (moved & flat), old.radius, radius)
        if curved:
            # Negative curvature is followed to the boundary, so there has to be one.
            radius = jnp.where(radius < jnp.inf, radius, 3 * length)
        x = jnp.where(moved, old.trial, old.w)
        model = self._model(x, old.scale, moved, curved)

        def norm(g: Vector) -> Scalar:
            return jnp.sqrt(jnp.sum(jnp.where(model.free, g * g / model.scale, 0)))

        # How wrong the gradient of the model was here, relative to where it came from.
        size, wrong = norm(model.gradient), norm(model.gradient - old.expected) / old.size
        forcing = jnp.where(moved & ~first, jnp.clip(wrong, 0, FORCING), old.forcing)
        here = eqx.tree_at(lambda now: (now.radius, now.forcing), old, (radius, forcing))
        usable = old.active & jnp.all(jnp.isfinite(model.gradient))
        new = self._proposed(here, model, usable)

        # Only now is the distance at the trial known.
        accept = moved & (~flat | (new.distance < old.distance))
        ended = flat & ~(moved & (new.distance < 0.9 * old.distance))

        def known(new: Scalar, old: Scalar) -> Scalar:
            # After a trial that was too long, two solves say something of the same point.
            return jnp.where(accept, new, jnp.where(moved, old, jnp.minimum(old, new)))

        error, distance = known(new.error, old.error), known(new.distance, old.distance)
        best = jnp.where(accept, cost, old.cost)
        done = (error <= self.tolerance) | ~jnp.isfinite(best)
        still = jnp.all(new.trial == x) | (new.predicted <= 0)
        spent = new.products >= self.max_products
        evaluations = old.evaluations + 1
        floored = ~done & (ended | still) & ~spent
        slow = ~first & ~(accept & (distance < 0.3 * old.distance)) & (evaluations >= PATIENCE)
        return _Progress(
            w=jnp.where(accept, x, old.w),
            cost=best,
            error=jnp.where(jnp.isfinite(best), error, jnp.inf),
            distance=distance,
            scale=model.scale,
            size=size,
            trial=new.trial,
            predicted=new.predicted,
            slope=new.slope,
            expected=new.expected,
            radius=new.radius,
            forcing=forcing,
            inverse=new.inverse,
            largest=new.largest,
            evaluations=evaluations,
            products=new.products,
            slow=old.slow | slow,
            active=~done & ~ended & ~still & (evaluations < self.max_steps),
            floored=floored,
        )

    def _model(self, x: Vector, scale: Vector, fresh: Flag, curved: bool) -> Model:
        """The model at x, with a new `scale` if it is `fresh`."""
        terms = self.terms
        r, push = jax.linearize(self.rows, x)
        transposed = jax.linear_transpose(push, x)
        pull = lambda v: transposed(v)[0]  # noqa: E731
        g = pull(r) + terms.ridge * x
        bend = None
        if curved:
            bend = jax.linearize(jax.grad(lambda w: jnp.vdot(r, self.rows(w))), x)[1]
        return Model(
            push=push,
            pull=pull,
            bend=bend,
            r=r,
            w=x,
            gradient=g,
            ridge=terms.ridge,
            scale=jax.lax.cond(
                fresh, lambda: squared_lengths(pull, r) + terms.ridge, lambda: scale
            ),
            free=~(((x <= terms.lower) & (g > 0)) | ((x >= terms.upper) & (g < 0))),
        )

    def _proposed(self, old: _Progress, model: Model, usable: Flag) -> _Progress:
        """The next trial from where the model is, and what the solve says of the distance there."""
        x, terms = model.w, self.terms

        def cut(now: _Progress, count: Count) -> Flag:
            # Where bounds cut a step off, its model may rise; a shorter one falls: as the radius
            # goes to 0 the step becomes that of a projected gradient.
            rises = (now.predicted <= 0) & jnp.any(now.trial != x)
            return (count == 0) | (rises & (count < 30))

        def propose(state: tuple[_Progress, Count]) -> tuple[_Progress, Count]:
            now, count = state
            radius = jnp.where(count > 0, 0.25 * now.radius, now.radius)
            found = truncated(
                model,
                radius,
                tolerance=self.tolerance,
                relative=now.forcing,
                inverse=now.inverse,
                most=jnp.where(usable, self.max_products - now.products, 0),
            )
            trial = jnp.clip(x + found.p, terms.lower, terms.upper)
            moved = trial - x
            image, bent, curvature = model.along(moved)
            slope = model.gradient @ moved
            predicted = -slope - 0.5 * curvature
            # An infinite radius cannot be made smaller.
            short = jnp.minimum(radius, model.length(found.p))
            # A solve that was cut off again says less of the distance.
            known = lambda new, old: jnp.where(count > 0, old, jnp.sqrt(new))  # noqa: E731
            new = eqx.tree_at(
                lambda now: (
                    now.trial,
                    now.slope,
                    now.predicted,
                    now.expected,
                    now.radius,
                    now.error,
                    now.distance,
                    now.inverse,
                    now.largest,
                    now.products,
                ),
                now,
                (
                    trial,
                    slope,
                    predicted,
                    model.gradient_at(moved, image, bent),
                    jnp.where(predicted > 0, radius, short),
                    known(found.gone + found.left, now.error),
                    known(found.gone + found.estimate, now.distance),
                    jnp.maximum(now.inverse, found.ritz.inverse),
                    jnp.maximum(now.largest, found.ritz.largest),
                    now.products + found.iterations,
                ),
            )
            return new, count + 1

        start = (old, jnp.zeros_like(old.products))
        return jax.lax.while_loop(lambda state: cut(*state), propose, start)[0]


def _next_radius(old: _Progress, length: Scalar, gain: Scalar, finite: Flag, moved: Flag) -> Scalar:
    """The trust region after a trial at this length, and what was gained there."""
    ratio = gain / old.predicted
    # Where a parabola through both costs and the slope has its minimum.
    bottom = -0.5 * old.slope / jnp.where(gain < 0, -gain - old.slope, -old.slope)
    shorter = jnp.clip(jnp.where(finite, bottom, 0.1), 0.1, 0.5) * length
    longer = jnp.where(ratio > 0.75, jnp.maximum(3 * length, old.radius), old.radius)
    return jnp.where(moved & ~(ratio < 0.25), longer, shorter)


def squared_lengths(
    pull: Callable[[Array], Vector], r: Float[Array, " m"], groups: int = GROUPS
) -> Vector:
    """Estimates of the squared lengths of the columns of J from as many products with J' as there
    are groups of rows, 1 for columns that vanish; after Bekas, Kokiopoulou and Saad (*Applied
    Numerical Mathematics* 57, 2007), who estimate diagonals. Their standard deviation is about
    `sqrt(2 / groups)` of them where all rows count alike, and 0 where rows of the same group have
    no column in common."""
    signs = jax.random.rademacher(jax.random.key(0), r.shape, r.dtype)
    member = jnp.arange(r.size)[None] % groups == jnp.arange(groups)[:, None]
    total = jnp.sum(jax.vmap(pull)(jnp.where(member, signs[None], 0)) ** 2, axis=0)
    return jnp.where(total > 0, total, 1)
