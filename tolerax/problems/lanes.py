"""States that are the minimizers of many least-squares problems: `Implicit` in lanes."""

import dataclasses
import inspect
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Provenance, Work
from tolerax.inner.lane_adjoint import Hessian, positions, solve_hessian
from tolerax.inner.lane_kkt import hold, solve_held
from tolerax.inner.levenberg_marquardt import (
    BatchedLevenbergMarquardt,
    LaneSolver,
    LeastSquaresResult,
    check_lanes,
    check_numbers,
)
from tolerax.inner.minimizers import NO_LIMIT, Limit
from tolerax.inner.residuals import structured
from tolerax.problems.implicit import BackwardReport, Fixed, Implicit, Solved
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Lane = Float[Array, " k"]
Scalar = Float[Array, ""]


class LaneAdjoint(eqx.Module):
    """The flat adjoint of all lanes, with error, work and outcome of each; and the potential of the
    problem nearby whose state is exact, which is the one that is differentiated."""

    x: Vector
    residual: Vector
    error: Lane
    products: Int[Array, " k"]
    failed: Bool[Array, " k"]
    potential: Any


class InLanes(eqx.Module):
    """The state solve of an [`Implicit`][] whose state is a minimizer of `|r_k(y_k, x_k)|^2 / 2 +
    ridge |y_k|^2 / 2` in every lane k: y has shape `(K, n)`, every leaf of x a leading axis of K.

    It solves for states and adjoints ([`Implicit.solution`][]), and gives no bounds on the errors
    of values. [`batched_least_squares`][] is the way to use it.

    - `residuals`: of one lane, `(w, data) -> (m,)`, or [`Pointwise`][]. - `solver`: of the lanes.
    - `ridge`, `bounds`: as of the solver. The adjoint has the same ridge.
    - `hessian`: of the adjoint, see [`batched_least_squares`][].
    - `max_products`: the most of `"cg"`. - `radius`: the first one of the trust regions.
    - `held`: `(w, more) -> (p,)`, `rows_held` = p equations that hold exactly. Then x is a pair
      `(data, more)`, and y the coefficients with p multipliers behind them: F is that of the KKT
      system.
    """

    residuals: Any
    ridge: Any = 0.0
    bounds: Any = None
    solver: LaneSolver = eqx.field(default_factory=BatchedLevenbergMarquardt)
    hessian: Hessian = eqx.field(static=True, default="exact")
    max_products: int = 100
    held: Any = None
    rows_held: int = eqx.field(static=True, default=0)
    radius: Any = None

    def __check_init__(self):
        if self.held is not None and (self.bounds is not None or self.hessian != "exact"):
            raise ValueError(
                f"held rows with bounds {self.bounds!r} and hessian={self.hessian!r}: they go with "
                "hessian='exact', and without bounds."
            )
        if self.hessian not in get_args(Hessian):
            raise ValueError(f"hessian is {self.hessian!r}: use one of {get_args(Hessian)}.")

    @property
    def provenance(self) -> Provenance:
        """The distance to a minimizer is a Newton step: an estimate."""
        return Provenance((("curvature", "estimated"),))

    @property
    def _places(self) -> dict[str, Any]:
        return {"block": self.solver.block, "sharding": self.solver.sharding}

    def first_estimates(self, y: Vector) -> dict[str, Array]:
        """None are carried."""
        del y
        return {}

    def constants(self, at: Fixed, carry: Any) -> None:
        """There are none."""
        del at, carry

    def potential(
        self,
        w: Float[Array, "k n"],
        data: PyTree,
        shift: ArrayLike = 0.0,
        change: ArrayLike = 0.0,
    ) -> Scalar:
        """The sum of all lanes, whose gradient in w is F: with held rows the Lagrangian. `shift` is
        added to the residuals and `change` to the multipliers."""
        tied = jnp.zeros((), w.dtype)
        if self.held is not None:
            data, more = data
            n = w.shape[1] - self.rows_held
            w, multipliers = w[:, :n], w[:, n:] + change
            tied = jnp.sum(multipliers * jax.vmap(self.held)(w, more))
        rows = jax.vmap(structured(self.residuals))(w, data) + shift
        ridge = jnp.broadcast_to(jnp.asarray(self.ridge, w.dtype), w.shape[:1])
        return 0.5 * jnp.sum(rows * rows) + 0.5 * jnp.sum(ridge[:, None] * w * w) + tied

    def solve_state(
        self, at: Fixed, known: None, y: Vector, tolerance: Array, limit: Limit = NO_LIMIT
    ) -> Solved:
        """Solve in all lanes; `lanes` of the answer is what the solver returned."""
        del known, limit
        w = y.reshape(at.problem.y0.shape)
        options = {"tolerance": tolerance, "ridge": self.ridge, "bounds": self.bounds}
        options["radius"] = self.radius
        fun, places = structured(self.residuals), self._places
        if self.held is None:
            found = self.solver(self.residuals, w, at.x, **options)
            y = found.w.ravel()
        else:
            data, more = at.x
            n = w.shape[1] - self.rows_held
            # The minimizer without the equations is near the one with them.
            found = self.solver(self.residuals, w[:, :n], data, **options)
            given = (found, data, more, self.ridge, tolerance)
            found, multipliers = hold(fun, self.held, *given, **places)
            y = jnp.concatenate([found.w, multipliers], axis=1).ravel()
        zero = jnp.zeros((), y.dtype)
        status = PointStatus.ok
        for kind in (PointStatus.floor, PointStatus.inaccurate, PointStatus.failed):
            status = PointStatus.where(jnp.any(found.status == kind), kind, status)
        work = Work(
            lower_gradients=jnp.sum(found.evaluations), hessian_products=jnp.sum(found.products)
        )
        error = jnp.linalg.norm(found.error)
        return Solved(y, 0 * y, error, zero, work, status, {}, lanes=found)

    def solve_transpose(
        self, at: Fixed, known: None, y: Vector, b: Vector, tolerance: Array
    ) -> LaneAdjoint:
        """Solve with the Hessians of all lanes."""
        del known
        shape = at.problem.y0.shape
        w = y.reshape(shape)
        fun, b = structured(self.residuals), b.reshape(shape)
        change = 0.0
        if self.held is not None:
            data, more = at.x
            given = (w, data, more, b, self.ridge, self.rows_held)
            solve, change = solve_held(fun, self.held, *given, **self._places)
        else:
            solve = solve_hessian(
                fun,
                w,
                at.x,
                b,
                ridge=jnp.broadcast_to(jnp.asarray(self.ridge, y.dtype), shape[:1]),
                free=positions(w, self.bounds),
                hessian=self.hessian,
                tolerance=tolerance,
                max_products=self.max_products,
                **self._places,
            )
        shift = 0.0 if solve.shift is None else solve.shift
        return LaneAdjoint(
            solve.x.ravel(),
            solve.residual.ravel(),
            solve.error,
            solve.products,
            solve.failed,
            lambda w, data: self.potential(w, data, shift, change),
        )

    solve_linear = solve_transpose


def batched_least_squares(
    residuals: Any,
    w: Float[Array, "k n"],
    data: PyTree = None,
    *,
    tolerance: ArrayLike = 1e-8,
    adjoint_tolerance: ArrayLike = 1e-10,
    ridge: ArrayLike = 0.0,
    bounds: tuple[ArrayLike, ArrayLike] | None = None,
    solver: LaneSolver | None = None,
    hessian: Hessian = "exact",
    max_products: int = 100,
    report: BackwardReport | None = None,
    radius: Lane | None = None,
    held: tuple[Any, PyTree] | None = None,
) -> LeastSquaresResult:
    """Minimize `|r(w_k, data_k)|^2 / 2 + ridge |w_k|^2 / 2` in every lane k, differentiably.

    The minimizers `w` of the answer can be differentiated in `data` (`jax.grad`, implicit function
    theorem); the rest of it, and the starts, have no derivative.

    A minimizer to a tolerance is the exact one for residuals that are shifted by as much in the
    range of the Jacobian. The derivative (with a factored `hessian`) is that of this problem
    nearby: errors of the solve are not divided by the eigenvalues of the Hessian.

    - `residuals`, `w`, `data`, `tolerance`, `ridge`, `bounds`: as of
      [`BatchedLevenbergMarquardt`][]. What residuals depend on differentiably must be in `data`.
    - `hessian`: of the backward solve. `"exact"`: `J'J + ridge + sum_i r_i r_i''`, factored;
      `"gauss-newton"`: without the sum, wrong by as much as the residuals do not vanish; `"cg"`:
      conjugate gradients on the exact one to `adjoint_tolerance` in the energy norm, or until
      `max_products`. Variables at a bound stay there.
    - `solver`: [`BatchedLevenbergMarquardt`][] by default. For thousands of unknowns
      [`GaussNewtonCG`][]; give `hessian="cg"` with it, the others (and `held`) form the Jacobian
      and its square.
    - `radius`: the first radius of each trust region, for instance that of an earlier answer.
    - `held`: a pair `(fun, more)`: equations `fun(w, more_k) = 0` that hold exactly in each lane,
      whatever the residuals, through the KKT system of the lane; `fun` returns shape `(p,)`, and
      leaves of `more` have a leading axis of lanes. Not with bounds, and with the exact Hessian.
    - `report`: `BackwardReport.blank(lanes)`; its gradient says how the backward solve went in
      each lane: the residual of the exact equation whichever `hessian` was used, and `failed`
      where the lane's part of the gradient was set to 0.

    >>> import jax, jax.numpy as jnp, tolerax
    >>> fit = lambda w, y: jnp.stack([w[0] - y, w[0] ** 2 - 4.0])
    >>> best = lambda y: tolerax.batched_least_squares(fit, jnp.ones((2, 1)), y).w[:, 0]
    >>> y = jnp.array([2.0, 1.0])
    >>> best(y).round(4)
    Array([2.    , 1.9385], dtype=float64)
    >>> jax.grad(lambda y: jnp.sum(best(y)))(y).round(4)
    Array([0.0588, 0.0643], dtype=float64)
    """
    check_lanes(w, data)
    check_numbers(ridge, tolerance, bounds)
    fixed = {"residuals": residuals, "ridge": ridge, "bounds": bounds}
    fixed |= {"tolerance": tolerance, "held": None if held is None else held[0]}
    for name, value in fixed.items():
        _refuse_tangents(name, value)
    if report is not None and report.failed.shape != w.shape[:1]:
        raise ValueError(
            f"report has shape {report.failed.shape}: give BackwardReport.blank({w.shape[0]}), one "
            "entry for each lane."
        )
    norm = InLanes(
        residuals,
        ridge,
        bounds,
        solver or BatchedLevenbergMarquardt(),
        hessian,
        max_products,
        held=None if held is None else held[0],
        radius=None if radius is None else jax.lax.stop_gradient(radius),
    )
    y0, n = w, w.shape[1]
    if held is not None:
        check_lanes(w, (data, held[1]))
        one = jax.eval_shape(jax.vmap(held[0]), w, held[1])
        if one.ndim != 2 or not 0 < one.shape[1] < n:
            raise ValueError(
                f"held returned shape {one.shape[1:]} for {n} unknowns: give a vector of 1 to "
                f"{n - 1} equations."
            )
        count = one.shape[1]
        norm = dataclasses.replace(norm, rows_held=count)
        y0 = jnp.concatenate([w, jnp.zeros((w.shape[0], count), w.dtype)], axis=1)
        data = (data, held[1])
    problem = Implicit(_no_cost, y0, potential=norm.potential, norm=norm)
    accuracy = Accuracy(tolerance, adjoint_tolerance)
    found, solved = problem.solution_and_report(data, accuracy, report)
    rest = jax.tree.map(jax.lax.stop_gradient, solved.lanes)
    return eqx.tree_at(lambda lanes: lanes.w, rest, found[:, :n])


def _refuse_tangents(name: str, value: Any, seen: tuple[int, ...] = ()) -> None:
    """Raise if a value, or what a function closes over, is being differentiated."""
    leaves = jax.tree.leaves(value)
    if any(isinstance(leaf, Tracer) and hasattr(leaf, "tangent") for leaf in leaves):
        raise ValueError(
            f"{name} is differentiated, and there are derivatives in data only: put it in data, "
            "with a leading axis of lanes, or use jax.lax.stop_gradient."
        )
    for leaf in leaves:
        function = inspect.unwrap(leaf) if callable(leaf) else leaf
        if not inspect.isfunction(function) or id(function) in seen:
            continue
        for inner, cell in inspect.getclosurevars(function).nonlocals.items():
            _refuse_tangents(f"{inner} in {name}", cell, (*seen, id(function)))


def _no_cost(w: PyTree, data: PyTree) -> Scalar:
    del w, data
    return jnp.zeros(())
