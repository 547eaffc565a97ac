"""Sums of squares: a problem that answers with its residuals, not with their sum alone."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Evaluation, Problem, Query, Work, exact_evaluation
from tolerax.problems.hessians import JacobianOf
from tolerax.problems.objective import HessianOf
from tolerax.problems.python_code import Wanted, point_status, points_of
from tolerax.problems.workers import Workers
from tolerax.validation import is_concrete


def _nothing(x: PyTree) -> None:
    """In the place of functions that are not called."""


def _flat(residuals: PyTree) -> Float[Array, " m"]:
    """Residuals as one real vector."""
    flat = ravel_pytree(residuals)[0]
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        raise TypeError(
            f"the residuals are {flat.dtype}: return real floats (for complex numbers the real and "
            "the imaginary parts)."
        )
    return flat


class Residuals(eqx.Module):
    """Flat residuals as a function of x, and half their sum of squares."""

    fun: Callable

    def __call__(self, x: PyTree) -> Float[Array, " m"]:
        return _flat(self.fun(x))

    def value(self, x: PyTree) -> Float[Array, ""]:
        """`|r|^2 / 2`."""
        return 0.5 * jnp.sum(jnp.square(self(x)))


class GaussNewton(eqx.Module):
    """Products with `J'J`, J the Jacobian of residuals at a point."""

    fun: Callable
    x: PyTree

    def mv(self, vector: PyTree) -> PyTree:
        """The product, nowhere against `vector`."""
        image, pullback = jax.linearize(self.fun, self.x)[1](vector), jax.vjp(self.fun, self.x)[1]
        return pullback(image)[0]


class SquaresHessian(HessianOf):
    """The Hessian of half a sum of squares of `residuals`."""

    residuals: Callable = eqx.field(kw_only=True)

    def gauss_newton(self) -> GaussNewton:
        """The operator without the second derivatives of the residuals."""
        return GaussNewton(self.residuals, self.x)


class LeastSquares(Problem):
    """`|r(x)|^2 / 2` for a vector r of residuals, as a problem with error 0.

    Beside the value it answers with the residuals, and with their Jacobian as an operator where
    second derivatives are asked for: for solvers that need more than the sum, such as
    [`EnsembleKalmanInversion`][]. For data y with noise of standard deviation sigma and a model g
    the residuals are `(g(x) - y) / sigma`.

    - `residuals`: `residuals(x)` returns an array of floats, or a pytree of them.
    - `bounds`, `host`, `on_error`, `executor`: as of [`Objective`][]; there are no gradients of
      `host` functions. An external simulator runs on [`Workers`][], with their deadlines, cache and
      journal.
    - `size`: the number of residuals, needed with `host=True` only.

    >>> import jax.numpy as jnp, tolerax
    >>> line = lambda x: x[0] + x[1] * jnp.arange(3.0) - jnp.array([1.0, 3.0, 5.0])
    >>> problem = tolerax.LeastSquares(line)
    >>> tolerax.solve(problem, tolerax.InexactLineSearch(), jnp.zeros(2)).x.round(6)
    Array([1., 2.], dtype=float64)
    """

    residuals: Callable
    bounds: tuple[PyTree, PyTree] | None = None
    size: int | None = eqx.field(static=True, default=None)
    is_host: bool = eqx.field(static=True, default=False)
    on_error: str = eqx.field(static=True, default="raise")
    # Where points are evaluated does not change what the problem is.
    executor: Workers | None = eqx.field(static=True, default=None, compare=False)

    def __init__(
        self,
        residuals: Callable,
        *,
        bounds: tuple[PyTree, PyTree] | None = None,
        size: int | None = None,
        host: bool = False,
        on_error: Literal["raise", "fail"] = "raise",
        executor: Any = None,
    ):
        if not callable(residuals):
            raise TypeError(f"residuals is {residuals!r}: give a callable.")
        if on_error not in ("raise", "fail"):
            raise ValueError(f'on_error is {on_error!r}: use "raise" or "fail".')
        if host and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size is {size!r}: with host=True give the number of residuals.")
        if executor is not None and not host:
            raise ValueError(
                f"executor is {executor!r}, but these residuals are evaluated by compiled code: "
                "leave executor out, or give host=True."
            )
        self.residuals = residuals
        self.bounds = bounds
        self.size = size
        self.is_host = host
        self.on_error = on_error
        self.executor = None if executor is None else Workers.of(executor)

    @property
    def host(self) -> bool:
        return self.is_host

    def _with(self, residuals: Callable, executor: Any) -> "LeastSquares":
        return LeastSquares(
            residuals,
            bounds=self.bounds,
            size=self.size,
            host=self.is_host,
            on_error=self.on_error,  # pyright: ignore[reportArgumentType]
            executor=executor,
        )

    def on(self, executor: Any) -> "LeastSquares":
        if executor is None and (self.executor is not None or not self.is_host):
            return self
        return self._with(self.residuals, Workers() if executor is None else executor)

    def close(self) -> None:
        if self.executor is not None:
            self.executor.release()

    def outline(self) -> "LeastSquares":
        return self._with(_nothing, None) if self.is_host else self

    def evaluate(self, query: Query) -> Evaluation:
        if self.is_host:
            return _interpreted(self.outline(), query, self.observe(query))
        mask = query.mask
        if mask is None:
            return self._point(query.x, query.derivatives)
        answers = eqx.filter_vmap(lambda x: self._point(x, query.derivatives))(query.x)
        total = jax.tree.map(lambda n: jnp.sum(jnp.where(mask, n, 0)), answers.work)
        return eqx.tree_at(lambda e: e.work, answers, total)

    def _point(self, x: PyTree, derivatives: int) -> Evaluation:
        fun, gradient = Residuals(self.residuals), None
        if derivatives:
            r, pullback = jax.vjp(fun, x)
            gradient = pullback(r)[0]
        else:
            r = fun(x)
        evaluation = exact_evaluation(
            0.5 * jnp.sum(jnp.square(r)),
            gradient,
            Work(points=1, values=1, gradients=int(derivatives > 0)),
            hessian=SquaresHessian(fun.value, x, residuals=fun) if derivatives > 1 else None,
        )
        jacobian = JacobianOf(fun, x) if derivatives > 1 else None
        none = lambda leaf: leaf is None  # noqa: E731
        where = lambda e: (e.residuals, e.residuals_jacobian)  # noqa: E731
        return eqx.tree_at(where, evaluation, (r, jacobian), is_leaf=none)

    # -- Python code ------------------------------------------------------------------------------

    def observe(self, query: Query) -> Any:
        """`Observed` at every point of the query: NumPy arrays."""
        if not self.is_host:
            return super().observe(query)
        if query.derivatives:
            raise TypeError(
                "this solver needs gradients, and the residuals are Python code: use a solver that "
                "needs values only, or residuals that JAX can trace."
            )
        dtype = np.dtype(jax.tree.leaves(query.x)[0].dtype)
        count = 1 if query.mask is None else query.mask.shape[0]
        rows = np.full((count, self.size or 0), np.nan, dtype)
        timed_out, calls = np.zeros(count, bool), 0
        if is_concrete(query):
            points, mask = points_of(query)
            asked = [i for i in range(count) if mask[i]]
            wanted = Wanted(None, 0, self.bounds, 0.0, residual_count=self.size)
            workers = self.executor or Workers()
            found = workers.evaluate(
                self.residuals, [points[i] for i in asked], wanted, self.on_error
            )
            for i, row in zip(asked, found, strict=True):
                if row.residuals is not None:
                    rows[i] = row.residuals
                timed_out[i] = row.outcome == "timed_out"
                calls += row.calls
        one = 0 if query.mask is None else slice(None)
        return Observed(rows[one], timed_out[one], np.asarray(calls))

    def interpret(self, query: Query, observed: Any) -> Evaluation:
        """What Python code answered, as an evaluation."""
        if not self.is_host:
            return super().interpret(query, observed)
        r, calls = observed.residuals, observed.calls
        value = 0.5 * jnp.sum(jnp.square(r), axis=-1)
        status = point_status(jnp.isfinite(value), observed.timed_out)
        work = Work(points=calls, values=calls)
        evaluation = exact_evaluation(value, None, work, status=status)
        none = lambda leaf: leaf is None  # noqa: E731
        return eqx.tree_at(lambda e: e.residuals, evaluation, r, is_leaf=none)


class Observed(NamedTuple):
    """What Python code gave: residuals, whether they came too late, and how often it was called."""

    residuals: Any
    timed_out: Any
    calls: Any


@eqx.filter_jit
def _interpreted(outline: LeastSquares, query: Query, observed: Observed) -> Evaluation:
    return outline.interpret(query, observed)
