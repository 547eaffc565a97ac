"""States that are the minimizers of many least-squares problems: `Implicit` in lanes."""

from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from tolerax.contracts import Accuracy, Provenance, Work
from tolerax.inner.lane_adjoint import Hessian, positions, solve_hessian
from tolerax.inner.levenberg_marquardt import BatchedLevenbergMarquardt, LeastSquaresResult
from tolerax.inner.residuals import structured
from tolerax.problems.implicit import BackwardReport, Fixed, Implicit, Solved
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Lane = Float[Array, " k"]
Scalar = Float[Array, ""]


class LaneAdjoint(eqx.Module):
    """The flat adjoint of all lanes, with error, work and outcome of each."""

    x: Vector
    residual: Vector
    error: Lane
    products: Int[Array, " k"]
    failed: Bool[Array, " k"]


class InLanes(eqx.Module):
    """The state solve of an [`Implicit`][] whose state is a minimizer of `|r_k(y_k, x_k)|^2 / 2 +
    ridge |y_k|^2 / 2` in every lane k: y has shape `(K, n)`, every leaf of x a leading axis of K.

    It solves for states and adjoints ([`Implicit.solution`][]), and gives no bounds on the errors
    of values. [`batched_least_squares`][] is the way to use it.

    - `residuals`: of one lane, `(w, data) -> (m,)`, or [`Pointwise`][]. - `solver`: of the lanes.
    - `ridge`, `bounds`: as of the solver. The adjoint has the same ridge.
    - `hessian`: of the adjoint, see [`batched_least_squares`][].
    - `max_products`: the most of `"cg"`.
    """

    residuals: Any
    ridge: Any = 0.0
    bounds: Any = None
    solver: BatchedLevenbergMarquardt = eqx.field(default_factory=BatchedLevenbergMarquardt)
    hessian: Hessian = eqx.field(static=True, default="exact")
    max_products: int = 100

    def __check_init__(self):
        if self.hessian not in get_args(Hessian):
            raise ValueError(f"hessian is {self.hessian!r}: use one of {get_args(Hessian)}.")

    @property
    def provenance(self) -> Provenance:
        """The distance to a minimizer is a Newton step: an estimate."""
        return Provenance((("curvature", "estimated"),))

    def first_estimates(self, y: Vector) -> dict[str, Array]:
        """None are carried."""
        del y
        return {}

    def constants(self, at: Fixed, carry: Any) -> None:
        """There are none."""
        del at, carry

    def potential(self, w: Float[Array, "k n"], data: PyTree) -> Scalar:
        """The sum of all lanes, whose gradient in w is F."""
        rows = jax.vmap(structured(self.residuals))(w, data)
        ridge = jnp.broadcast_to(jnp.asarray(self.ridge, w.dtype), w.shape[:1])
        return 0.5 * jnp.sum(rows * rows) + 0.5 * jnp.sum(ridge[:, None] * w * w)

    def solve_state(
        self, at: Fixed, known: None, y: Vector, tolerance: Array, effort: ArrayLike = jnp.inf
    ) -> Solved:
        """Solve in all lanes; `lanes` of the answer is what the solver returned."""
        del known, effort
        w = y.reshape(at.problem.y0.shape)
        options = {"tolerance": tolerance, "ridge": self.ridge, "bounds": self.bounds}
        found = self.solver(self.residuals, w, at.x, **options)
        zero = jnp.zeros((), y.dtype)
        status = PointStatus.ok
        for kind in (PointStatus.floor, PointStatus.inaccurate, PointStatus.failed):
            status = PointStatus.where(jnp.any(found.status == kind), kind, status)
        work = Work(lower_gradients=jnp.sum(found.evaluations))
        error = jnp.linalg.norm(found.error)
        return Solved(found.w.ravel(), 0 * y, error, zero, work, status, {}, lanes=found)

    def solve_transpose(
        self, at: Fixed, known: None, y: Vector, b: Vector, tolerance: Array
    ) -> LaneAdjoint:
        """Solve with the Hessians of all lanes."""
        del known
        shape = at.problem.y0.shape
        w = y.reshape(shape)
        solve = solve_hessian(
            structured(self.residuals),
            w,
            at.x,
            b.reshape(shape),
            ridge=jnp.broadcast_to(jnp.asarray(self.ridge, y.dtype), shape[:1]),
            free=positions(w, self.bounds),
            hessian=self.hessian,
            tolerance=tolerance,
            max_products=self.max_products,
            block=self.solver.block,
            sharding=self.solver.sharding,
        )
        return LaneAdjoint(
            solve.x.ravel(), solve.residual.ravel(), solve.error, solve.products, solve.failed
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
    solver: BatchedLevenbergMarquardt | None = None,
    hessian: Hessian = "exact",
    max_products: int = 100,
    report: BackwardReport | None = None,
) -> LeastSquaresResult:
    """Minimize `|r(w_k, data_k)|^2 / 2 + ridge |w_k|^2 / 2` in every lane k, differentiably.

    The minimizers `w` of the answer can be differentiated in `data` (`jax.grad`, implicit function
    theorem); the rest of it, and the starts, have no derivative.

    - `residuals`, `w`, `data`, `tolerance`, `ridge`, `bounds`: as of
      [`BatchedLevenbergMarquardt`][]. What residuals depend on differentiably must be in `data`.
    - `hessian`: of the backward solve. `"exact"`: `J'J + ridge + sum_i r_i r_i''`, factored;
      `"gauss-newton"`: without the sum, wrong by as much as the residuals do not vanish; `"cg"`:
      conjugate gradients on the exact one to `adjoint_tolerance` in the energy norm, or until
      `max_products`. Variables at a bound stay there.
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
    norm = InLanes(
        residuals,
        ridge,
        bounds,
        solver or BatchedLevenbergMarquardt(),
        hessian,
        max_products,
    )
    problem = Implicit(_no_cost, w, potential=norm.potential, norm=norm)
    accuracy = Accuracy(tolerance, adjoint_tolerance)
    found, solved = problem.solution_and_report(data, accuracy, report)
    rest = jax.tree.map(jax.lax.stop_gradient, solved.lanes)
    return eqx.tree_at(lambda lanes: lanes.w, rest, found)


def _no_cost(w: PyTree, data: PyTree) -> Scalar:
    del w, data
    return jnp.zeros(())
