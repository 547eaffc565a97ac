"""Bilevel problems: minimize upper(y, x) over x where y minimizes lower(., x)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Accuracy, Evaluation, Problem, Provenance, Query
from tolerax.inner.krylov import CG
from tolerax.inner.minimizers import Minimizer, NewtonCG
from tolerax.problems.constants import Proved
from tolerax.problems.energy import Energy
from tolerax.problems.euclidean import Euclidean
from tolerax.problems.implicit import BackwardReport, Implicit, Solved
from tolerax.problems.norms import CrossBounds as CrossBounds

Constant = float | Array | Callable | Proved | None


class SumOver(eqx.Module):
    """The sum (or mean) of `fun(y, x, item)` over the items of `data`, as a function of (y, x).

    - `data`: a pytree of arrays with a leading axis over the items. It travels as an argument of
      compiled code, never as a constant.
    - `batch_size`: evaluate that many items at a time, to save memory.

    >>> import jax.numpy as jnp
    >>> loss = SumOver(
    ...     lambda y, x, item: (y * item["a"] - item["b"]) ** 2,
    ...     {"a": jnp.ones(4), "b": jnp.arange(4.0)},
    ...     reduction="mean",
    ... )
    >>> float(loss(jnp.array(1.5), None))
    1.25
    """

    fun: Callable[[PyTree, PyTree, PyTree], Float[Array, ""]]
    data: PyTree
    reduction: str = eqx.field(static=True, default="sum")
    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f'reduction is {self.reduction!r}: use "sum" or "mean".')
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give at least 1, or None.")
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(self.data)}
        if len(sizes) != 1 or () in sizes or (0,) in sizes:
            raise ValueError(
                "data must be arrays with one leading axis over at least one item, got leading "
                f"sizes {sorted(sizes)}."
            )

    def __call__(self, y: PyTree, x: PyTree) -> Float[Array, ""]:
        one = lambda item: self.fun(y, x, item)  # noqa: E731
        if self.batch_size is None:
            terms = jax.vmap(one)(self.data)
        else:
            terms = jax.lax.map(one, self.data, batch_size=self.batch_size)
        return jnp.sum(terms) if self.reduction == "sum" else jnp.mean(terms)


class Bilevel(Problem):
    """Minimize `upper(y, x)` over hyperparameters x, where y minimizes `lower(y, x)`.

    The lower level has to be strongly convex and smooth in y. It is never solved exactly: values
    and gradients come with bounds on their errors, computed from achieved residuals in the energy
    norm of the lower-level Hessian H.

    **Arguments:**

    - `upper(y, x)`, `lower(y, x)`: scalars; y and x are pytrees of float arrays. Sums over data are
      written with [`SumOver`][].
    - `y0`: where the first lower-level solve starts; fixes the structure of y.
    - `strong_convexity`: mu with H >= mu for all y: a number, a callable of x, or a callable
      that returns a pytree like y (a diagonal lower bound on H, which can be far sharper).
    - `self_concordance`: M with `|D^3 lower[u, u, v]| <= M |v|_2 u'Hu`, a number or a callable of
      x; 0 says that `lower` is quadratic in y.
    - `upper_smoothness`: Lipschitz constant of `grad_y upper` in y, a number or a callable of x.
    - `self_concordance_along`: callable (v, x) -> N with `|D^3 lower[u, u, v]| <= N u'Hu` for that
      v, where M |v|_2 is blunt: for a sum of losses of `a'y` it is a multiple of the largest
      `|a'v|`.
    - `relative_smoothness`: A with `Hess_yy upper <= A H` for all y, a number or a callable of x,
      where the smoothness over mu is blunt.
    - `cross`: callable (y, q, x) -> [`CrossBounds`][] on the derivative of `grad_y lower` in x.
    - `bounds`: pair of pytrees like x, or scalars.
    - `lower_solver`: [`NewtonCG`][], [`LBFGS`][] or [`AcceleratedGradient`][] of `tolerax.inner`.
    - `adjoint_solver`: [`CG`][].
    - `preconditioner`: callable (y, x) -> what resembles H at y: a pytree like y, its diagonal, or
      an operator whose `mv(r)` is `P^-1 r` on pytrees like y for a symmetric positive definite P,
      for instance [`AlternatingLines`][]. Linear solves use it once an iteration, [`LBFGS`][]
      twice, [`AcceleratedGradient`][] never; no count of `Work` contains that. Bounds never rest
      on it: a bad one costs iterations, one of the wrong sign ends them without an answer.
    - `recycle`: rank of a preconditioner that is learned from the linear solves of a run, of the
      form `D + L L'` with D the strong convexity (see `tolerax.inner.Recycled`): worth its memory
      where the Hessian exceeds D by far along a modest number of directions. The carry holds
      `recycle` vectors like y. 0 for none; not together with `preconditioner`, and without effect
      in the Euclidean norm.
    - `norm`: `"energy"`, or `"euclidean"` for the bounds as published (MAID, arXiv 2308.10098),
      which are kept for comparisons and take no account of `cross` and `relative_smoothness`.

    A constant is given (plain value), proved (`tolerax.proved`) or estimated (`None`). Estimates
    are measured on the way, cost some Hessian products, and make every bound an estimate.

    >>> import jax.numpy as jnp, tolerax
    >>> target = jnp.array([1.0, 2.0])
    >>> ridge = tolerax.Bilevel(
    ...     upper=lambda y, x: jnp.sum((y - 0.5 * target) ** 2),
    ...     lower=lambda y, x: 0.5 * jnp.sum((y - target) ** 2) + 0.5 * jnp.exp(x) * jnp.sum(y**2),
    ...     y0=jnp.zeros(2),
    ...     strong_convexity=1.0,
    ...     self_concordance=0.0,
    ...     upper_smoothness=2.0,
    ... )
    >>> solution = tolerax.solve(ridge, tolerax.InexactLineSearch(), jnp.array(-1.0))
    >>> abs(float(solution.x)) < 1e-5
    True
    """

    oracle: Implicit
    bounds: tuple[PyTree, PyTree] | None

    def __init__(
        self,
        upper: Callable[[PyTree, PyTree], Float[Array, ""]],
        lower: Callable[[PyTree, PyTree], Float[Array, ""]],
        y0: PyTree[Float[Array, "..."]],
        *,
        strong_convexity: Constant = None,
        self_concordance: Constant = None,
        upper_smoothness: Constant = None,
        cross: Callable | Proved | None = None,
        self_concordance_along: Callable | Proved | None = None,
        relative_smoothness: Constant = None,
        bounds: tuple[PyTree, PyTree] | None = None,
        lower_solver: Minimizer | None = None,
        adjoint_solver: CG | None = None,
        preconditioner: Callable[[PyTree, PyTree], PyTree] | None = None,
        recycle: int = 0,
        norm: str = "energy",
    ):
        if norm not in ("energy", "euclidean"):
            raise ValueError(f'norm is {norm!r}: use "energy" or "euclidean".')
        if recycle < 0 or (recycle and preconditioner is not None):
            raise ValueError(
                f"recycle is {recycle} with preconditioner {preconditioner!r}: give a rank of at "
                "least 0, and only one of both."
            )
        for name, function in (("upper", upper), ("lower", lower)):
            if not callable(function):
                raise TypeError(f"{name} is {function!r}: give a function of (y, x).")
        kind = Energy if norm == "energy" else Euclidean
        self.oracle = Implicit(
            upper,
            y0,
            potential=lower,
            norm=kind(
                strong_convexity=strong_convexity,
                self_concordance=self_concordance,
                upper_smoothness=upper_smoothness,
                cross=cross,
                state_solver=NewtonCG() if lower_solver is None else lower_solver,
                adjoint_solver=CG() if adjoint_solver is None else adjoint_solver,
                preconditioner=preconditioner,
                self_concordance_along=self_concordance_along,
                relative_smoothness=relative_smoothness,
                recycle=recycle if norm == "energy" else 0,
            ),
        )
        self.bounds = bounds

    @property
    def provenance(self) -> Provenance:
        return self.oracle.provenance

    def cold_start(self) -> Any:
        return self.oracle.cold_start()

    def solution(
        self, x: PyTree, accuracy: Accuracy, report: BackwardReport | None = None
    ) -> PyTree:
        """The lower-level solution y(x), differentiable in x; see [`Implicit.solution`][]."""
        return self.oracle.solution(x, accuracy, report)

    def solution_and_report(
        self, x: PyTree, accuracy: Accuracy, report: BackwardReport | None = None
    ) -> tuple[PyTree, Solved]:
        """The same with how the forward solve went: `status` and the bound `error` on the distance
        to the solution, which a solve that ran out of iterations leaves above what was asked."""
        return self.oracle.solution_and_report(x, accuracy, report)

    def evaluate(self, query: Query) -> Evaluation:
        return self.oracle.evaluate(query)
