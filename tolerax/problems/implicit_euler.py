"""Implicit Euler steps with inexact solves and their discrete adjoint, for problems in time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from tolerax.contracts import Accuracy, Evaluation, Product, Work, tree_all_finite
from tolerax.inner.roots import linear_solver_for
from tolerax.problems.march import March
from tolerax.status import PointStatus

Scalar = Float[Array, ""]

SAFETY = 2.0  # errors to first order are raised by this factor


class ImplicitEuler(eqx.Module):
    """Steps of equal length, `z = y + dt f(t + dt, z, u)`, for [`TimeDependent`][].

    The discrete problem is the truth: running costs are sums over the ends of steps. Every step is
    solved by Newton's method, its adjoint by one linear solve, each to a share of what is asked of
    the whole trajectory. Errors are those to first order, found by solving for them, times 2.

    - `steps`: their number. Controls on n intervals need a multiple of n.
    - `preconditioner`: callable dt -> (r -> P^-1 r), on pytrees like y, symmetric and positive
      definite, P near `I - dt f_y`; for a heat equation
      `lambda dt: lambda r: laplacian.solve(r, 1 / dt) / dt`.
    - `symmetric`: whether f_y is: then [`MINRES`][] takes the place of [`GMRES`][].
      `linear_solver`: another method with their signature, for instance [`Direct`][].
    - `store_up_to`: a trajectory of more numbers than this is not stored. The gradient then takes
      memory for about twice the square root of `steps` states, and steps are made twice.

    Every use of the preconditioner counts as one of `pde_solves`; without one residuals count as
    `lower_gradients` and products with `K` as `hessian_products`.
    """

    steps: int = eqx.field(static=True, default=100)
    preconditioner: Callable[[Scalar], Callable[[PyTree], PyTree]] | None = None
    linear_solver: Any = None
    symmetric: bool = eqx.field(static=True, default=False)
    store_up_to: int = eqx.field(static=True, default=10**7)

    def __check_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is {self.steps!r}: give a positive integer.")

    def cold_start(self) -> None:
        """Nothing: every step starts from the state before."""

    @property
    def linear(self) -> Any:
        """The method for linear systems."""
        return linear_solver_for(self.linear_solver, self.symmetric)

    def evaluate(
        self, problem: Any, x: PyTree, accuracy: Accuracy, carry: None, derivatives: int
    ) -> Evaluation:
        """One point."""
        del carry
        march = March(problem, x, accuracy)
        ahead, trail = march.forward()
        back = march.backward(ahead, trail)
        gradient = march.assemble(x, ahead.y, back.gradient, back.p)
        from_state, from_adjoint = (
            SAFETY * problem.dual_norm(tree) for tree in march.assemble_errors(ahead, back)
        )
        y, eps = ahead.y, jnp.finfo(ahead.y.dtype).eps
        value = problem.final_cost(march.unravel(y), x) + ahead.cost - back.correction
        # The last state is part of the cost too; rounding is part of every error.
        last = march.weight * jnp.abs(jnp.dot(ahead.dy, back.last))
        rounding = 8 * eps * jnp.sqrt(march.steps)
        value_error = SAFETY * (back.value_error + 0.5 * last) + rounding * jnp.abs(value)
        from_adjoint = from_adjoint + 2 * rounding * problem.dual_norm(gradient)
        parts = Accuracy(from_state, from_adjoint)
        root = jnp.sqrt(march.weight)
        achieved = Accuracy(SAFETY * root * ahead.largest, SAFETY * root * back.largest)
        finite = jnp.isfinite(value + value_error + parts.total) & tree_all_finite(gradient)
        ok = finite & ~ahead.failed
        # Errors that could not be solved for are not known.
        known = jnp.isfinite(ahead.largest + back.largest)
        bounds = (value_error, parts)
        value_error, parts = jax.tree.map(lambda bound: jnp.where(known, bound, jnp.inf), bounds)
        status = PointStatus.where(ahead.short | back.short, PointStatus.inaccurate, PointStatus.ok)
        status = PointStatus.where(ok, status, PointStatus.failed)
        hessian = None
        if derivatives > 1:
            trail = march.states(trail) if march.stored else None
            hessian = HessianInTime(problem, x, accuracy, trail)
        return Evaluation(
            value=value,
            value_error=value_error,
            gradient=gradient,
            gradient_error=parts.total,
            gradient_error_parts=parts,
            achieved=achieved,
            work=march.work(ahead, back) + Work(points=1, values=1, gradients=1),
            status=status,
            hessian=hessian,
            provenance=problem.provenance,
        )


class HessianInTime(eqx.Module):
    """Products with the Hessian by one sweep of tangents forward and one back."""

    problem: Any
    x: PyTree
    accuracy: Accuracy
    known: Any
    second: Scalar = eqx.field(default_factory=lambda: jnp.ones(()))

    def mv(self, vector: PyTree) -> PyTree:
        """The Hessian times `vector`, a pytree like x, with solves as for the gradient."""
        eps = jnp.sqrt(jnp.finfo(self.accuracy.adjoint.dtype).eps)
        return self.product(vector, jnp.clip(self.accuracy.adjoint, eps, 0.1)).vector

    def product(self, vector: PyTree, tolerance: ArrayLike) -> Product:
        """The same with linear solves to a relative tolerance; the error is an estimate."""
        march = March(
            self.problem, self.x, self.accuracy, vector, tolerance, self.known, self.second
        )
        ahead, trail = march.forward()
        back = march.backward(ahead, trail)
        (product,) = march.assemble_errors(ahead, back)
        error = jnp.asarray(tolerance) * self.problem.dual_norm(product)
        return Product(product, error, march.work(ahead, back))

    def gauss_newton(self) -> "HessianInTime":
        """The operator without the second derivatives of the vector field."""
        return HessianInTime(self.problem, self.x, self.accuracy, self.known, jnp.zeros(()))
