"""PDE-constrained problems in state and control at once, with the equation as a constraint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from tolerax.contracts import Evaluation, Problem, Query, Work
from tolerax.inner.spectral import Laplacian
from tolerax.problems.objective import Objective
from tolerax.validation import check_like


class Paired(eqx.Module):
    """A function of state and control as one of the pair."""

    fun: Callable

    def __call__(self, x: tuple[PyTree, PyTree]) -> Any:
        return self.fun(*x)


class FullSpace(Problem):
    """Minimize `cost(y, u)` subject to `residual(y, u) = 0`: no state is ever solved for, state,
    control and adjoint converge together.

    - `preconditioner(y, u)`: an operator whose `mv(a, b)` takes a pair like `(y, u)` and a tree
      like the residual, as of `Evaluation.preconditioner`; for instance [`MatchedSchur`][]. A
      good one keeps the work from growing with the grid or with a small weight of the control.

    x is the pair `(y, u)`. Made by [`PDEConstrained.full_space`][].

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.inner import Laplacian
    >>> from tolerax.problems import FullSpace, MatchedSchur
    >>> laplacian, area, alpha = Laplacian((15, 15)), 1 / 16**2, 1e-4
    >>> problem = FullSpace(
    ...     lambda y, u: 0.5 * area * (jnp.sum((y - 1.0) ** 2) + alpha * jnp.sum(u**2)),
    ...     lambda y, u: area * (laplacian.mv(y) - u),
    ...     lambda y, u: MatchedSchur(laplacian, alpha, 0.0),
    ... )
    >>> solver = tolerax.ExactAugmentedLagrangian(rtol=1e-6, atol=0.0)
    >>> zero = jnp.zeros((15, 15))
    >>> solution = tolerax.solve(problem, solver, (zero, zero))
    >>> bool(solution.success), round(float(solution.value), 4)
    (True, 0.1...)
    """

    cost: Callable
    residual: Callable
    preconditioner: Callable
    bounds: tuple[PyTree, PyTree] | None

    def __init__(
        self,
        cost: Callable[[PyTree, PyTree], Float[Array, ""]],
        residual: Callable[[PyTree, PyTree], PyTree],
        preconditioner: Callable[[PyTree, PyTree], Any],
    ):
        for name, given in (("cost", cost), ("residual", residual)):
            if not callable(given):
                raise TypeError(f"{name} is {given!r}: give a callable of state and control.")
        if not callable(preconditioner):
            raise TypeError(
                f"preconditioner is {preconditioner!r}: give a callable of state and control that "
                "returns an operator, for instance `MatchedSchur(laplacian, alpha, 0.0)`."
            )
        self.cost = cost
        self.residual = residual
        self.preconditioner = preconditioner
        self.bounds = None

    @property
    def constraint_bounds(self) -> tuple[PyTree, PyTree]:
        return 0.0, 0.0

    def evaluate(self, query: Query) -> Evaluation:
        whole = Objective(
            Paired(self.cost), constraints=Paired(self.residual), constraint_bounds=(0.0, 0.0)
        )
        if query.mask is not None:
            return whole.evaluate(query)
        check_like("residual", jax.eval_shape(self.residual, *query.x), query.x[0], "the state")
        inverse = self.preconditioner(*query.x)
        if not callable(getattr(inverse, "mv", None)):
            raise TypeError(
                f"preconditioner returned {inverse!r}: return an operator with `mv(a, b)`, for "
                "instance `MatchedSchur(laplacian, alpha, 0.0)`."
            )
        return dataclasses.replace(whole.evaluate(query), preconditioner=inverse)


class MatchedSchur(eqx.Module):
    """`diag(M, alpha M, S)^-1` for costs `M |y - y_d|^2 / 2 + alpha M |u|^2 / 2` and equations
    `M (A y + r(y) - u)`, with M the area of a cell, A minus the Laplacian, and

        S = M (A + shift + 1 / sqrt(alpha))^2 .

    Eigenvalues of the preconditioned Schur complement lie between 1/2 and 1 for linear equations,
    whatever alpha and the grid are.

    - `shift`: a number near r'(y), for instance its mean.

    One use counts as two solves with the Laplacian, although the transform does both at once.

    Source: Pearson and Wathen (*Numer. Linear Algebra Appl.* 19, 2012).
    """

    laplacian: Laplacian
    alpha: Float[Array, ""]
    shift: Float[Array, ""]

    def __init__(self, laplacian: Laplacian, alpha: ArrayLike, shift: ArrayLike):
        self.laplacian = laplacian
        self.alpha = jnp.asarray(alpha, laplacian.values[0].dtype)
        self.shift = jnp.asarray(shift, laplacian.values[0].dtype)

    @property
    def work(self) -> Work:
        """What one use costs."""
        return Work(pde_solves=2)

    def mv(self, a: tuple[Array, Array], b: Array) -> tuple[tuple[Array, Array], Array]:
        """The inverse applied to a pair like `(y, u)` and to a residual."""
        area = 1.0
        for h in self.laplacian.spacing:
            area = area * h
        shift = self.shift + 1 / jnp.sqrt(self.alpha)
        squared = self.laplacian.function(lambda v: 1 / v**2, b, shift)
        return (a[0] / area, a[1] / (self.alpha * area)), squared / area
