"""PDE-constrained problems: minimize a cost of state and control, where the state solves an
equation."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Evaluation, Query
from tolerax.inner.roots import NewtonKrylov, linear_solver_for
from tolerax.problems.full_space import FullSpace
from tolerax.problems.implicit import Implicit
from tolerax.problems.stability import Stability
from tolerax.validation import check_like


class PDEConstrained(Implicit):
    """Minimize `cost(y, u)` over controls u, where the state y solves `residual(y, u) = 0`.

    The state is solved by Newton's method, state and adjoint to tolerances of their own, and value
    and gradient come with bounds on their errors: an [`Implicit`][] problem whose norm is
    [`Stability`][].

    **Arguments:**

    - `residual(y, u)`: F, a pytree like y: a discretized equation with its boundary conditions.
      `cost(y, u)`: scalar. `y0`: pytree, where the first state solve starts.
    - `riesz`: callable u -> (r -> R^-1 r), on pytrees like y: a fast solve with the leading part of
      the equation, over the weight of the residual. It measures errors and preconditions every
      solve. `None`: Euclidean norms, no preconditioner.
    - `stability`, `curvature`, `smoothness`, `cross`, `monotone`: constants of the bounds, see
      [`Stability`][]; estimated where they are `None`.
    - `symmetric`: whether F_y is symmetric: then [`MINRES`][] takes the place of [`GMRES`][].
      `linear_solver`: another method with their signature, for instance [`Direct`][] where `riesz`
      is the inverse of F_y.
    - `metric`: the inner product on the control, see [`Implicit`][]: for a control on a grid the
      area of a cell, so that gradients, norms and iteration counts do not depend on the grid.
    - `bounds`: pair of pytrees like u, or scalars.

    Cost and residual should be weighted so that tolerances mean something: sums over a grid by the
    area of a cell. [`MatchedSchur`][], for [`PDEConstrained.full_space`][], rests on that.

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.inner import Laplacian
    >>> laplacian = Laplacian((15, 15))
    >>> h2 = 1 / 16**2
    >>> problem = tolerax.PDEConstrained(
    ...     lambda y, u: h2 * (laplacian.mv(y) - u),
    ...     lambda y, u: 0.5 * h2 * (jnp.sum((y - 1.0) ** 2) + 1e-4 * jnp.sum(u**2)),
    ...     jnp.zeros((15, 15)),
    ...     riesz=lambda u: lambda r: laplacian.solve(r) / h2,
    ...     metric=h2,
    ...     stability=1.0,
    ...     curvature=0.0,
    ...     symmetric=True,
    ... )
    >>> evaluation = problem.evaluate(
    ...     tolerax.Query(jnp.zeros((15, 15)), tolerax.Accuracy(1e-6, 1e-6))
    ... )
    >>> round(float(evaluation.value), 4)
    0.4395
    """

    def __init__(
        self,
        residual: Callable[[PyTree, PyTree], PyTree],
        cost: Callable[[PyTree, PyTree], Float[Array, ""]],
        y0: PyTree[Float[Array, "..."]],
        *,
        riesz: Callable[[PyTree], Callable[[PyTree], PyTree]] | None = None,
        stability: Any = None,
        curvature: Any = None,
        smoothness: Any = None,
        cross: Any = None,
        monotone: bool = False,
        symmetric: bool = False,
        linear_solver: Any = None,
        metric: Any = None,
        bounds: tuple[PyTree, PyTree] | None = None,
    ):
        linear = linear_solver_for(linear_solver, symmetric)
        norm = Stability(
            stability=stability,
            curvature=curvature,
            smoothness=smoothness,
            cross=cross,
            monotone=monotone,
            riesz=riesz,
            state_solver=NewtonKrylov(linear),
            adjoint_solver=linear,
        )
        super().__init__(cost, y0, residual=residual, norm=norm, metric=metric, bounds=bounds)

    def evaluate(self, query: Query) -> Evaluation:
        x = query.x
        if query.mask is not None:
            x = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x), x)
        assert self.residual is not None
        check_like("residual", jax.eval_shape(self.residual, self.y0, x), self.y0, "y0")
        return super().evaluate(query)

    def full_space(self, preconditioner: Callable[[PyTree, PyTree], Any]) -> FullSpace:
        """The same problem in state and control at once, for [`ExactAugmentedLagrangian`][]; see
        [`FullSpace`][]. Start from `(y0, u0)`."""
        assert self.residual is not None
        if self.bounds is not None:
            raise ValueError(
                f"bounds are {self.bounds!r}, and a full space keeps none: solve the problem "
                "itself with `InexactNewton` or `InexactLineSearch`, or leave the bounds out."
            )
        return FullSpace(self.cost, self.residual, preconditioner)
