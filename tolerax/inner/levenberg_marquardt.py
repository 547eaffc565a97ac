"""Many small nonlinear least-squares problems at once."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Solver, Start
from tolerax.inner.lane_blocks import in_blocks, lanes_at_once, one_by_one
from tolerax.inner.lanes import Lanes, Terms, first_lanes, told
from tolerax.inner.residuals import structured
from tolerax.status import Status, is_failed
from tolerax.validation import is_concrete

Lane = Float[Array, " k"]
Rows = Float[Array, "k n"]


class LeastSquaresResult(eqx.Module):
    """The answer in every lane (K of them).

    - `w`: the minimizers. `cost`: `|r|^2 / 2 + ridge |w|^2 / 2` there.
    - `error`: the length in the energy norm of the step that is left: the distance to the
      minimizer up to second order. `condition`: estimate of the condition number of J'J + ridge
      with columns of length 1.
    - `evaluations`: of residuals and Jacobian. `products`: with a Jacobian that is not formed (0
      where it is). `status`: a `PointStatus` for each lane.
    - `radius`: of the trust region, to start with next time.
    """

    w: Rows
    cost: Lane
    error: Lane
    condition: Lane
    evaluations: Int[Array, " k"]
    products: Int[Array, " k"]
    status: Any
    radius: Lane


@runtime_checkable
class LaneSolver(Protocol):
    """What solves least-squares problems in lanes: [`BatchedLevenbergMarquardt`][] or
    [`GaussNewtonCG`][]. Derivatives of the minimizers are solved for in the same blocks, on the
    same devices."""

    @property
    def block(self) -> int | None: ...

    @property
    def sharding(self) -> NamedSharding | None: ...

    def __call__(
        self,
        residuals: Any,
        w: Any,
        data: Any = None,
        *,
        tolerance: Any,
        ridge: Any,
        bounds: Any,
        radius: Any,
    ) -> LeastSquaresResult: ...


class LeastSquaresState(eqx.Module):
    """The run of one problem: a single lane, and the gradient that scales the tolerance."""

    lanes: Lanes
    terms: Terms
    like: PyTree
    gradient: Float[Array, " n"]
    first: Float[Array, ""]
    failed: Bool[Array, ""]
    done: Bool[Array, ""]
    status: Any


class BatchedLevenbergMarquardt(Solver):
    """Levenberg-Marquardt for many small nonlinear least-squares problems at once.

    Minimizes `|r_k(w_k)|^2 / 2 + ridge_k |w_k|^2 / 2` in every lane k = 1..K, each with a trust
    region, a convergence test and a status of its own. The first step is that of Gauss-Newton;
    steps that fail shrink the trust region, in which the damping is found by Newton's method
    (Moré, *Lecture Notes in Mathematics* 630, 1978). A lane that converges slowly, as data that
    the model cannot explain make it, goes on with exact second derivatives wherever these are
    positive definite. Normal equations are solved by Cholesky's method with columns of length 1 and
    one step of refinement; lanes in which they have lost their digits use QR. The Jacobian and J'J
    of a lane are always formed, so n is to be some hundreds at most: for lanes with thousands of
    unknowns use [`GaussNewtonCG`][], for one such problem in `solve` [`InexactNewton`][], which
    take products only.

    - `max_steps`: the most evaluations of a lane.
    - `block`: how many lanes go through together at most. Blocks run one after another, each until
      its slowest lane is done. `None`: on CPUs as many as have a quarter of a million entries in
      their Jacobians; those that are not done with most of their block go on one by one, so that
      lanes which have finished are not paid for. Elsewhere all of them.
    - `sharding`: over which devices lanes are spread (all axes of its mesh); their number need not
      divide that of the lanes. One device gives what eight give.
    - `rtol`, `atol`: for `solve` and `minimize`: converged when `|projected gradient| <=
      atol + rtol * |projected gradient at x0|`.

    **In lanes**: call it, see `__call__`. Nested batches (`vmap`) run until their slowest lane is
    done and always take QR: flatten them into the one axis of lanes.

    **A single problem**: as any other solver, for problems that answer with residuals.

    >>> import jax.numpy as jnp, tolerax
    >>> decay = lambda w, y: w[0] * jnp.exp(-w[1] * jnp.arange(5.0)) - y
    >>> y = jnp.array([[2.0], [1.0]]) * 0.5 ** jnp.arange(5.0)[None]
    >>> solver = tolerax.BatchedLevenbergMarquardt()
    >>> solver(decay, jnp.ones((2, 2)), y, tolerance=1e-8).w.round(4)
    Array([[2.    , 0.6931],
           [1.    , 0.6931]], dtype=float64)
    >>> problem = tolerax.LeastSquares(lambda w: decay(w, y[0]))
    >>> tolerax.solve(problem, solver, jnp.ones(2)).x.round(4)
    Array([2.    , 0.6931], dtype=float64)
    """

    rtol: float = 1e-8
    atol: float = 1e-6
    max_steps: int = 200
    block: int | None = eqx.field(static=True, default=None)
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.block is not None and self.block < 1:
            raise ValueError(f"block is {self.block}: give 1 or more lanes, or None.")
        if isinstance(self.max_steps, int) and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: give at least 1 evaluation.")
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not value >= 0:
                raise ValueError(f"{name} is {value}: it must not be negative.")

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
        """Solve in every lane until the error in the energy norm is at most `tolerance`.

        - `residuals(w, data)`: of one lane, from `(n,)` to `(m,)`; or [`Pointwise`][].
        - `w`: the starts, shape `(K, n)`. - `data`: pytree with a leading axis of K on every leaf.
        - `tolerance`, `ridge`: numbers, or one for each lane.
        - `bounds`: pair of arrays that broadcast to `(K, n)`.
        - `radius`: the first radius of the trust region in each lane (of `|S step|`, with S the
          lengths of the columns of J); infinite by default.

        A lane whose start is not finite, or has residuals that are not, fails alone: it keeps its
        start and the status `failed`. So does one whose ridge is negative, or with a lower bound
        above the upper one, where compiled code computes them; otherwise these are errors.
        """
        fun = structured(residuals)
        start, terms, tolerance, radius = prepared(w, data, tolerance, ridge, bounds, radius)
        lanes = first_lanes(start, radius)

        def step(lanes: Lanes, data: PyTree, terms: Terms, tolerance: Lane) -> Lanes:
            r, J = jax.vmap(fun.with_jacobian)(lanes.trial, data)
            curved = lanes.newton & lanes.active

            def curvature() -> Array:
                S = jax.vmap(fun.curvature)(lanes.trial, data, r)
                return jnp.where(curved[:, None, None], S, 0)

            nothing = lambda: jnp.zeros_like(lanes.normal.gram)  # noqa: E731
            S = jax.lax.cond(jnp.any(curved), curvature, nothing)
            lanes = told(lanes, r, J, terms, tolerance, S)
            more = lanes.active & (lanes.evaluations < self.max_steps)
            return eqx.tree_at(lambda lane: lane.active, lanes, more)

        def unfinished(lanes: Lanes) -> Bool[Array, ""]:
            return jnp.any(lanes.active)

        def together(lanes: Lanes) -> Bool[Array, ""]:
            # Second derivatives of one lane are paid for by all.
            most = 2 * jnp.sum(lanes.active) > lanes.active.size
            return most & ~jnp.any(lanes.newton & lanes.active)

        def whole(lanes: Lanes, *given: Any) -> Lanes:
            return jax.lax.while_loop(unfinished, lambda lanes: step(lanes, *given), lanes)

        def first_together(lanes: Lanes, *given: Any) -> Lanes:
            if lanes.active.size == 1:
                return whole(lanes, *given)
            lanes = jax.lax.while_loop(together, lambda lanes: step(lanes, *given), lanes)
            return one_by_one(whole, lanes.active, lanes, *given)

        block, run = self.block, whole
        if block is None and jax.default_backend() == "cpu":
            block, run = lanes_at_once(fun, w, data), first_together
        lanes = in_blocks(run, block, self.sharding, lanes, data, terms, tolerance)
        return LeastSquaresResult(
            w=lanes.w,
            cost=lanes.cost,
            error=lanes.decrement,
            condition=lanes.normal.condition,
            evaluations=lanes.evaluations,
            products=jnp.zeros_like(lanes.evaluations),
            status=lanes.status(tolerance),
            radius=lanes.radius,
        )

    # -- one problem ------------------------------------------------------------------------------

    @property
    def honours_bounds(self) -> bool:
        return True

    def init(self, start: Start) -> LeastSquaresState:
        x, _ = ravel_pytree(start.x)
        flat = lambda tree: ravel_pytree(tree)[0][None]  # noqa: E731
        sides = (jnp.full_like(x, -jnp.inf), jnp.full_like(x, jnp.inf))
        lower, upper = map(flat, sides if start.bounds is None else start.bounds)
        like = jax.tree.map(jnp.zeros_like, start.x)
        answer = start.answer(self._query(start.x))
        if answer.residuals is None or answer.residuals_jacobian is None:
            raise TypeError(
                "BatchedLevenbergMarquardt needs residuals, and this problem answers with values "
                "only: use `tolerax.LeastSquares(residuals)`, or another solver."
            )
        false, zero = jnp.array(False), jnp.zeros((), x.dtype)
        return LeastSquaresState(
            lanes=first_lanes(x[None], jnp.full(1, jnp.inf, x.dtype)),
            terms=Terms(jnp.zeros(1, x.dtype), lower, upper),
            like=like,
            gradient=jnp.zeros_like(x),
            first=zero,
            failed=false,
            done=false,
            status=Status.running,
        )

    def _query(self, x: PyTree) -> Query:
        return Query(x, Accuracy(0.0, 0.0), derivatives=2)

    def ask(self, state: LeastSquaresState) -> Query:
        return self._query(ravel_pytree(state.like)[1](state.lanes.trial[0]))

    def tell(
        self, state: LeastSquaresState, query: Query, evaluation: Evaluation
    ) -> LeastSquaresState:
        del query
        lanes, terms = state.lanes, state.terms
        dtype = lanes.w.dtype
        r = evaluation.residuals.astype(dtype)
        unravel = ravel_pytree(state.like)[1]
        eye = jnp.eye(lanes.w.shape[1], dtype=dtype)
        column = lambda v: evaluation.residuals_jacobian.mv(unravel(v))  # noqa: E731
        J = jax.vmap(column, out_axes=1)(eye).astype(dtype)
        failed = is_failed(evaluation.status)
        r = jnp.where(failed, jnp.nan, r)
        # The Hessian of the sum of squares has the curvature of the residuals in it.
        S = jnp.zeros_like(lanes.normal.gram)
        if evaluation.hessian is not None:
            product = lambda v: ravel_pytree(evaluation.hessian.mv(unravel(v)))[0]  # noqa: E731

            def curvature() -> Array:
                return (jax.vmap(product, out_axes=1)(eye) - J.T @ J)[None].astype(dtype)

            S = jax.lax.cond(lanes.newton[0], curvature, lambda: S)
        first = lanes.cost[0] == jnp.inf
        lanes = told(lanes, r[None], J[None], terms, jnp.zeros(1, dtype), S)
        g = jnp.where(lanes.normal.free[0], lanes.normal.gradient[0], 0)
        size = jnp.linalg.norm(g)
        scale = jnp.where(first, size, state.first)
        small = size <= self.atol + self.rtol * scale
        # How much rounding x may change the gradient; a tolerance below it is met by chance.
        curved = jnp.abs(lanes.normal.gram[0]) @ jnp.abs(lanes.w[0])
        floor = jnp.finfo(dtype).eps * jnp.linalg.norm(curved)
        blurred = self.atol + self.rtol * scale < floor
        lost = first & ~jnp.isfinite(lanes.cost[0])
        converged = Status.converged
        if not evaluation.provenance.certified:
            converged = Status.converged_estimated
        stuck = ~lanes.active[0]
        status = Status.where(stuck, Status.stalled, Status.running)
        status = Status.where(small, converged, status)
        status = Status.where((small | stuck) & blurred, Status.accuracy_floor, status)
        status = Status.where(lost, Status.non_finite_start, status)
        return LeastSquaresState(
            lanes=lanes,
            terms=terms,
            like=state.like,
            gradient=g,
            first=scale,
            failed=failed,
            done=small | stuck | lost,
            status=status,
        )

    def terminate(self, state: LeastSquaresState) -> tuple[Bool[Array, ""], Any]:
        return state.done, state.status

    def verify(self, state: LeastSquaresState, evaluation: Evaluation) -> Bool[Array, ""]:
        g, _ = ravel_pytree(evaluation.gradient)
        size = jnp.linalg.norm(jnp.where(state.lanes.normal.free[0], g, 0))
        return size <= 2 * (self.atol + self.rtol * state.first)

    def record(self, state: LeastSquaresState) -> dict[str, Array]:
        lanes = state.lanes
        return {"iteration": lanes.evaluations[0], "damping": lanes.damping[0]}


def prepared(
    w: Rows,
    data: PyTree,
    tolerance: ArrayLike,
    ridge: ArrayLike,
    bounds: tuple[ArrayLike, ArrayLike] | None,
    radius: Lane | None,
) -> tuple[Rows, Terms, Lane, Lane]:
    """Starts within the bounds, ridge and bounds, tolerances and radii, of every lane. Lanes whose
    numbers make no sense have a ridge that is not a number, so that they fail."""
    check_lanes(w, data)
    check_numbers(ridge, tolerance, bounds)
    count = w.shape[0]
    spread = lambda value: jnp.broadcast_to(jnp.asarray(value, w.dtype), (count,))  # noqa: E731
    low, high = (-jnp.inf, jnp.inf) if bounds is None else bounds
    full = lambda value: jnp.broadcast_to(_rows(value, w.dtype), w.shape)  # noqa: E731
    terms = Terms(spread(ridge), full(low), full(high))
    sensible = (terms.ridge >= 0) & jnp.all(terms.lower <= terms.upper, axis=1)
    terms = eqx.tree_at(lambda t: t.ridge, terms, jnp.where(sensible, terms.ridge, jnp.nan))
    start = jnp.clip(w, terms.lower, terms.upper)
    radius = jnp.full(count, jnp.inf, w.dtype) if radius is None else radius
    return start, terms, spread(tolerance), radius


def _rows(value: ArrayLike, dtype: Any) -> Array:
    """A bound with the axes of lanes and variables."""
    array = jnp.asarray(value, dtype)
    return array.reshape((1,) * (2 - array.ndim) + array.shape)


def check_numbers(ridge: Any, tolerance: Any, bounds: Any) -> None:
    """Raise for known numbers that make no sense."""
    for name, value in (("ridge", ridge), ("tolerance", tolerance)):
        if is_concrete(value) and not np.all(np.asarray(value) >= 0):
            raise ValueError(f"{name} is {value}: it must not be negative.")
    if bounds is not None and is_concrete(bounds) and not np.all(np.less_equal(*bounds)):
        raise ValueError(
            f"bounds are {bounds}: lower bounds must not be above the upper ones, nor be NaN."
        )


def check_lanes(w: Array, data: PyTree) -> None:
    """Raise for data that have no axis of lanes."""
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w has shape {w.shape} and type {w.dtype}: give floats, (lanes, n).")
    for leaf in jax.tree.leaves(data):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != w.shape[0]:
            raise ValueError(
                f"an array of data has shape {jnp.shape(leaf)}, and w has {w.shape[0]} lanes: give "
                "every array in data a leading axis of lanes."
            )
