"""The inexact oracle: `phi(x) = J(y, x)` where y solves `F(y, x) = 0`, never exactly.

State and adjoint are solved to requested tolerances; value and gradient come with bounds on their
errors, computed from the residuals that were achieved:

    value     J(y, x) - q'F(y, x)               F_y' q = J_y; its error is second order
    gradient  J_x(y, x) - F_x(y, x)' q
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from tolerax.contracts import (
    Accuracy,
    Evaluation,
    Problem,
    Product,
    Provenance,
    Query,
    Work,
    tree_all_finite,
)
from tolerax.inner.metric import Metric, definite_norm
from tolerax.inner.minimizers import Limit
from tolerax.status import PointStatus
from tolerax.validation import one_dtype

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class Carry(eqx.Module):
    """The warm start of an implicit problem: state, adjoint, and estimated constants."""

    y: Vector
    q: Vector
    estimates: dict[str, Array]


class Fixed:
    """The functions of an implicit problem at a fixed x, on flat vectors y and q; with another
    potential if one is given."""

    def __init__(self, problem: "Implicit", x: PyTree, potential: Callable | None = None):
        self.problem, self.x = problem, x
        self.h = problem.potential if potential is None else potential
        self.flat_x, self.unravel_x = ravel_pytree(x)
        _, self.unravel = ravel_pytree(problem.y0)

    def cost(self, y: Vector) -> Scalar:
        """J(y, x)."""
        return self.problem.cost(self.unravel(y), self.x)

    def potential(self, y: Vector) -> Scalar:
        """h(y, x) with F = grad_y h."""
        assert self.h is not None
        return self.h(self.unravel(y), self.x)

    def residual(self, y: Vector) -> Vector:
        """F(y, x)."""
        if self.problem.residual is None:
            return jax.grad(self.potential)(y)
        return ravel_pytree(self.problem.residual(self.unravel(y), self.x))[0]

    def lagrangian(self, y: Vector, q: Vector, flat_x: Float[Array, " m"]) -> Scalar:
        """J(y, x) - <q, F(y, x)>: its gradient in x is the gradient of phi."""
        x = self.unravel_x(flat_x)
        return self.problem.cost(self.unravel(y), x) - self.pairing(y, q, x)

    def pairing(self, y: Vector, q: Vector, x: PyTree) -> Scalar:
        """<q, F(y, x)>."""
        problem, y_tree = self.problem, self.unravel(y)
        if problem.residual is None:
            h = self.h
            assert h is not None
            return jax.jvp(lambda y: h(y, x), (y_tree,), (self.unravel(q),))[1]
        return jnp.vdot(ravel_pytree(problem.residual(y_tree, x))[0], q)

    def riesz_x(self, g: Float[Array, " m"]) -> Float[Array, " m"]:
        """R^-1 g for what is like the gradient in x, with R the metric of the problem."""
        metric = self.problem.metric
        return g if metric is None else ravel_pytree(metric.solve(self.unravel_x(g)))[0]

    def norm_x(self, v: Float[Array, " m"]) -> Scalar:
        """The norm of what is like x."""
        metric = self.problem.metric
        if metric is None:
            return jnp.linalg.norm(v)
        return definite_norm(v, ravel_pytree(metric.mv(self.unravel_x(v)))[0])

    def dual_x(self, g: Float[Array, " m"]) -> Scalar:
        """The dual norm, that of gradients."""
        if self.problem.metric is None:
            return jnp.linalg.norm(g)
        return definite_norm(g, self.riesz_x(g))

    def constant(self, value: Any) -> Scalar:
        """A constant of the problem at x as a scalar."""
        from tolerax.problems.constants import constant

        return jnp.asarray(constant(value, self.x), self.flat_x.dtype)


class Solved(eqx.Module):
    """A state or adjoint solve: the vector, bounds on its error, the work and the outcome;
    `rounding` is what rounding may have added to the residual, in the dual norm; `memory` is what
    linear solves have learned, if anything; `lanes` is what became of independent parts."""

    vector: Vector
    residual: Vector
    error: Scalar
    exponent: Scalar
    work: Work
    status: Any
    estimates: dict[str, Array]
    rounding: Scalar | float = 0.0
    memory: Any = None
    lanes: Any = None


class Implicit(Problem):
    """Minimize `cost(y, x)` over x, where y solves `residual(y, x) = 0`.

    **Arguments:**

    - `cost(y, x)`: scalar J. `y0`: pytree, where the first state solve starts.
    - `residual(y, x)`: F, a pytree like y; or `potential(y, x)`: scalar h with `F = grad_y h`, for
      a state that minimizes h.
    - `norm`: how state and adjoint are solved, how errors are measured and which constants bound
      them: [`Energy`][], [`Euclidean`][] (both with a `potential`) or [`Stability`][] (with a
      `residual`).
    - `metric`: the inner product on x in which solvers measure steps and gradients: a positive
      number or a pytree of weights like x, or a [`Metric`][]; `None` for the Euclidean one.
    - `bounds`: pair of pytrees like x, or scalars.

    The three tolerances are separate: `Accuracy.state` is on the state, `Accuracy.adjoint` on the
    adjoint (which never inherits that of the state), and Hessian products take their own.
    """

    cost: Callable[[PyTree, PyTree], Scalar]
    y0: PyTree[Float[Array, "..."]]
    residual: Callable[[PyTree, PyTree], PyTree] | None
    potential: Callable[[PyTree, PyTree], Scalar] | None
    norm: Any
    bounds: tuple[PyTree, PyTree] | None
    metric: Metric | None

    def __init__(
        self,
        cost: Callable[[PyTree, PyTree], Scalar],
        y0: PyTree[Float[Array, "..."]],
        *,
        residual: Callable[[PyTree, PyTree], PyTree] | None = None,
        potential: Callable[[PyTree, PyTree], Scalar] | None = None,
        norm: Any,
        metric: Any = None,
        bounds: tuple[PyTree, PyTree] | None = None,
    ):
        if (residual is None) == (potential is None):
            raise ValueError("give either residual or potential (whose gradient in y is F).")
        if not jax.tree.leaves(y0) or not all(
            jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) for leaf in jax.tree.leaves(y0)
        ):
            raise TypeError(
                "y0 must be a pytree of float arrays with at least one entry: cast it, for "
                "instance with `jnp.asarray(y0, float)`."
            )
        self.cost = cost
        self.y0 = jax.tree.map(jnp.asarray, y0)
        one_dtype(self.y0, "y0")
        self.residual = residual
        self.potential = potential
        self.norm = norm
        self.metric = Metric.of(metric)
        self.bounds = bounds

    @property
    def provenance(self) -> Provenance:
        return self.norm.provenance

    def cold_start(self) -> Carry:
        y, _ = ravel_pytree(self.y0)
        return Carry(y, jnp.zeros_like(y), self.norm.first_estimates(y))

    def evaluate(self, query: Query) -> Evaluation:
        one_dtype({"x0": query.x, "y0": self.y0}, "")
        if query.mask is None:
            carry = self.cold_start() if query.carry is None else query.carry
            cutoff = jnp.inf if query.cutoff is None else query.cutoff
            effort = jnp.inf if query.effort is None else query.effort
            answer = self._point(query.x, query.accuracy, carry, query.derivatives, cutoff, effort)
            return dataclasses.replace(answer, metric=self.metric)
        count = query.mask.shape[0]
        carry = query.carry
        if carry is None:
            spread = lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf)))  # noqa: E731
            carry = jax.tree.map(spread, self.cold_start())
        accuracy = jax.tree.map(lambda t: jnp.broadcast_to(t, (count,)), query.accuracy)
        point = lambda x, a, c: self._point(x, a, c, query.derivatives)  # noqa: E731
        answers = eqx.filter_vmap(point)(query.x, accuracy, carry)
        mask = query.mask
        counted = lambda n: jnp.sum(jnp.where(mask, n, 0))  # noqa: E731
        return eqx.tree_at(lambda e: e.work, answers, jax.tree.map(counted, answers.work))

    def _point(
        self,
        x: PyTree,
        accuracy: Accuracy,
        carry: Carry,
        derivatives: int,
        cutoff: ArrayLike = jnp.inf,
        effort: ArrayLike = jnp.inf,
    ) -> Evaluation:
        at = Fixed(self, x)
        known = self.norm.constants(at, carry)

        def hopeless_at(y: Vector, error: Scalar) -> Array:
            j, g_y = jax.value_and_grad(at.cost)(y)
            return self.norm.least_value(at, known, error, j, g_y) > cutoff

        limit = Limit(effort, hopeless_at)
        state = self.norm.solve_state(at, known, carry.y, accuracy.state, limit)
        if state.memory is not None:
            known = eqx.tree_at(lambda k: k.memory, known, state.memory)
        y, r = state.vector, state.residual
        j, g_y = jax.value_and_grad(at.cost)(y)
        # A hopeless point needs no adjoint: the guess is good enough to say so.
        hopeless = self.norm.least_value(at, known, state.error, j, g_y) > cutoff
        hopeless = hopeless | (state.work.units >= effort)
        adjoint_tolerance = jnp.where(hopeless, jnp.inf, accuracy.adjoint)
        adjoint = self.norm.solve_adjoint(at, known, y, g_y, carry.q, adjoint_tolerance)
        q = adjoint.vector
        value, errors, estimates, more = self.norm.errors(at, known, state, adjoint, j, g_y)
        gradient = jax.grad(at.lagrangian, argnums=2)(y, q, at.flat_x)
        # Rounding is part of every error.
        eps = jnp.finfo(y.dtype).eps
        size = jnp.abs(j) + jnp.linalg.norm(q) * jnp.linalg.norm(r)
        value_error = errors.value + 8 * eps * size
        from_adjoint = errors.from_adjoint + 16 * eps * at.dual_x(gradient)
        parts = Accuracy(errors.from_state, from_adjoint)
        finite = jnp.isfinite(value) & tree_all_finite((gradient, y, q))
        status = _worse(state.status, adjoint.status)
        wrong = jnp.asarray(errors.contradicted)
        if errors.adjoint_norm is not None:
            j_x = jax.grad(lambda x: self.cost(at.unravel(y), at.unravel_x(x)))(at.flat_x)
            allowed = 1.01 * errors.per_adjoint * errors.adjoint_norm
            rounding = 1e3 * eps * (at.dual_x(j_x) + at.dual_x(gradient))
            wrong = wrong | ~(at.dual_x(gradient - j_x) <= allowed + rounding)
        status = PointStatus.where(wrong, PointStatus.contradicted, status)
        status = PointStatus.where(finite, status, PointStatus.failed)
        new = Carry(y, q, estimates)
        # A failed point must not spoil the next warm start.
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, carry)
        hessian = None
        if derivatives > 1:
            shows = (errors.per_state, errors.per_adjoint)
            hessian = ReducedHessian(self, x, y, q, known, shows, accuracy.adjoint)
        one = Work(points=1, values=1, gradients=1)
        return Evaluation(
            value=value,
            value_error=value_error,
            gradient=at.unravel_x(gradient),
            gradient_error=parts.total,
            gradient_error_parts=parts,
            achieved=Accuracy(state.error, adjoint.error),
            work=state.work + adjoint.work + more + one,
            status=status,
            carry=new,
            hessian=hessian,
            provenance=self.provenance,
        )

    def solution(
        self,
        x: PyTree,
        accuracy: Accuracy,
        report: "BackwardReport | None" = None,
        guess: PyTree | None = None,
    ) -> PyTree:
        """The state y(x), differentiable in x by `jax.grad` (implicit function theorem).

        - `accuracy`: `state` is the tolerance of the forward solve, `adjoint` that of the backward
          solve; the second never inherits the first.
        - `report`: [`BackwardReport.blank`][]; its gradient returns how the backward solve went.
        - `guess`: where the solve starts, a pytree like y; `y0` by default.

        The derivative does not depend on the guess or on the iterations of the solve.

        >>> import jax, jax.numpy as jnp, tolerax
        >>> from tolerax.problems import BackwardReport
        >>> ridge = tolerax.Bilevel(
        ...     lambda y, x: jnp.sum(y**2),
        ...     lambda y, x: 0.5 * jnp.sum((y - 1) ** 2) + 0.5 * x * jnp.sum(y**2),
        ...     jnp.zeros(2),
        ...     strong_convexity=1.0,
        ...     self_concordance=0.0,
        ... )
        >>> loss = lambda x, report: jnp.sum(
        ...     ridge.solution(x, tolerax.Accuracy(1e-10, 1e-10), report)
        ... )
        >>> slope, report = jax.grad(loss, argnums=(0, 1))(1.0, BackwardReport.blank())
        >>> round(float(slope), 6), bool(report.residual < 1e-9)
        (-0.5, True)
        """
        return self.solution_and_report(x, accuracy, report, guess)[0]

    def solution_and_report(
        self,
        x: PyTree,
        accuracy: Accuracy,
        report: "BackwardReport | None" = None,
        guess: PyTree | None = None,
    ) -> tuple[PyTree, Solved]:
        """The same with the report of the forward solve, which has no derivative."""
        guess = jax.tree.map(jax.lax.stop_gradient, self.y0 if guess is None else guess)
        return _solution((x, report), self, accuracy, guess)

    def solve_state(
        self, x: PyTree, tolerance: float | Array, carry: Carry | None = None
    ) -> tuple[PyTree, Solved]:
        """The state y(x) to a tolerance, as a pytree, and the report of the solve."""
        carry = self.cold_start() if carry is None else carry
        at = Fixed(self, x)
        known = self.norm.constants(at, carry)
        state = self.norm.solve_state(at, known, carry.y, jnp.asarray(tolerance))
        return at.unravel(state.vector), state


class BackwardReport(eqx.Module):
    """How the backward solve of [`Implicit.solution`][] went, returned as a gradient.

    Pass `BackwardReport.blank()` to `solution` and differentiate with respect to it as well: its
    "gradient" holds the achieved `residual` (Euclidean), the bound on the `error` of the adjoint in
    the norm of the problem, and the `products` that the solve took. Where the state falls into
    independent lanes it has an entry for each (`blank(lanes)`), and `failed` is 1 for those
    whose adjoint could not be solved for: their part of the gradient is 0.
    """

    residual: Float[Array, "*lanes"]
    error: Float[Array, "*lanes"]
    products: Float[Array, "*lanes"]
    failed: Float[Array, "*lanes"]

    @classmethod
    def blank(cls, lanes: int | None = None) -> "BackwardReport":
        """Zeros, to be filled by the backward pass."""
        zero = jnp.zeros(() if lanes is None else (lanes,))
        return cls(zero, zero, zero, zero)


@eqx.filter_custom_vjp
def _solution(
    inputs: tuple, problem: Implicit, accuracy: Accuracy, guess: PyTree
) -> tuple[PyTree, Solved]:
    x, _ = inputs
    y, _ = ravel_pytree(guess)
    cold = problem.cold_start()
    return problem.solve_state(x, accuracy.state, eqx.tree_at(lambda c: c.y, cold, y))


@_solution.def_fwd
def _solution_forward(
    perturbed: PyTree, inputs: tuple, problem: Implicit, accuracy: Accuracy, guess: PyTree
) -> tuple[tuple[PyTree, Solved], PyTree]:
    del perturbed
    answer = _solution(inputs, problem, accuracy, guess)
    return answer, answer[0]


@_solution.def_bwd
def _solution_backward(
    y: PyTree,
    y_bar: tuple[PyTree, Solved],
    perturbed: PyTree,
    inputs: tuple,
    problem: Implicit,
    accuracy: Accuracy,
    guess: PyTree,
) -> tuple:
    """The adjoint solve `F_y' q = y_bar`, then `x_bar = -F_x' q`."""
    del perturbed, guess
    x, report = inputs
    at = Fixed(problem, x)
    zeros = lambda bar, y: jnp.zeros_like(y) if bar is None else bar  # noqa: E731
    y_bar = jax.tree.map(zeros, y_bar[0], y, is_leaf=lambda leaf: leaf is None)
    flat, b = ravel_pytree(y)[0], ravel_pytree(y_bar)[0]
    known = problem.norm.constants(at, problem.cold_start())
    solve = problem.norm.solve_transpose(at, known, flat, b, accuracy.adjoint)
    # A solve that took y for the state of a problem nearby is differentiated as that problem.
    at = Fixed(problem, x, getattr(solve, "potential", None))
    # Numbers of Python's have a derivative too; integers have none.
    real = lambda leaf: isinstance(leaf, float) or eqx.is_inexact_array(leaf)  # noqa: E731
    moving, still = eqx.partition(x, real)
    x_bar = jax.grad(lambda x: -at.pairing(flat, solve.x, eqx.combine(x, still)))(moving)
    failed = getattr(solve, "failed", None)
    if failed is not None:
        # Products of 0 with what is not a number: only the part of that lane is 0.
        clean = lambda bar: jnp.where(failed.reshape(-1, *[1] * (bar.ndim - 1)), 0, bar)  # noqa: E731
        x_bar = jax.tree.map(clean, x_bar)
    if report is not None:
        lost = jnp.zeros(()) if failed is None else failed
        parts = solve.residual.reshape(*jnp.shape(lost), -1)
        filled = (jnp.linalg.norm(parts, axis=-1), solve.error, solve.products, lost)
        kinds = jax.tree.leaves(report)
        report = BackwardReport(*(a.astype(b.dtype) for a, b in zip(filled, kinds, strict=True)))
    return x_bar, report


def _worse(first: Any, second: Any) -> Any:
    """The worse of two outcomes of inner solves."""
    status = PointStatus.ok
    for bad in (PointStatus.floor, PointStatus.inaccurate, PointStatus.contradicted):
        status = PointStatus.where((first == bad) | (second == bad), bad, status)
    failed = (first == PointStatus.failed) | (second == PointStatus.failed)
    return PointStatus.where(failed, PointStatus.failed, status)


class ReducedHessian(eqx.Module):
    """Products with the Hessian of phi at a point, through the adjoint equation.

    With the Lagrangian L = J - <q, F>, `y' = -F_y^-1 F_x v` and `F_y' q' = L_yx v + L_yy y'`, the
    product is `L_xx v + L_xy y' - F_x' q'`: two linear solves, never a derivative of one. The
    Gauss-Newton product leaves out the second derivatives of F: J takes the place of L, and where J
    is convex the product with v is nowhere against v.
    """

    problem: Implicit
    x: PyTree
    y: Vector
    q: Vector
    known: Any
    shows: tuple[Scalar, Scalar]
    tolerance: Scalar

    def mv(self, vector: PyTree) -> PyTree:
        """The Hessian of phi times `vector`, a pytree like x; errors of the solves within, for each
        unit of `vector`, at most the adjoint tolerance of the query."""
        scale = jnp.linalg.norm(ravel_pytree(vector)[0])
        tolerance = self.tolerance * jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)
        return self._product(vector, tolerance, 0.0).vector

    def product(self, vector: PyTree, tolerance: ArrayLike) -> Product:
        """The same with a relative tolerance for both linear solves; and what that led to."""
        return self._product(vector, jnp.zeros_like(self.tolerance), tolerance)

    def gauss_newton(self) -> "ReducedHessian":
        """The operator without the second derivatives of F."""
        return dataclasses.replace(self, q=jnp.zeros_like(self.q))

    def _product(self, vector: PyTree, tolerance: Scalar, relative: ArrayLike) -> Product:
        at = Fixed(self.problem, self.x)
        v = ravel_pytree(vector)[0]
        norm, known, y, q = self.problem.norm, self.known, self.y, self.q

        def f_of_x(flat_x: Float[Array, " m"]) -> Vector:
            return -jax.grad(at.lagrangian, argnums=1)(y, q, flat_x)

        f_x_v = jax.jvp(f_of_x, (at.flat_x,), (v,))[1]
        forward = norm.solve_linear(at, known, y, -f_x_v, tolerance, relative, exact=False)
        gradients = lambda y, x: jax.grad(at.lagrangian, argnums=(0, 2))(y, q, x)  # noqa: E731
        l_y, l_x = jax.jvp(gradients, (y, at.flat_x), (forward.x, v))[1]
        backward = norm.solve_transpose(at, known, y, l_y, tolerance, relative, exact=False)
        last = jax.vjp(f_of_x, at.flat_x)[1](backward.x)[0]
        per_state, per_adjoint = self.shows
        return Product(
            at.unravel_x(l_x - last),
            per_state * forward.error + per_adjoint * backward.error,
            norm.linear_work(forward.products + backward.products),
        )
