"""Sums of squares: a problem that answers with its residuals, not with their sum alone."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from tolerax.contracts import Evaluation, Problem, Query, Work, exact_evaluation
from tolerax.problems.hessians import JacobianOf
from tolerax.problems.objective import HessianOf
from tolerax.validation import is_concrete

logger = logging.getLogger("tolerax")


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
      `host` functions.
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
    executor: Any = eqx.field(static=True, default=None)

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
        if executor is not None and not (host and hasattr(executor, "submit")):
            raise ValueError(
                f"executor is {executor!r}: it must have `submit(fn, *args)`, and serves functions "
                "with host=True only."
            )
        self.residuals = residuals
        self.bounds = bounds
        self.size = size
        self.is_host = host
        self.on_error = on_error
        self.executor = executor

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
        return self._with(self.residuals, executor)

    def outline(self) -> "LeastSquares":
        return self._with(_nothing, None) if self.is_host else self

    def evaluate(self, query: Query) -> Evaluation:
        if self.is_host:
            return self._evaluate_on_host(query)
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

    def _evaluate_on_host(self, query: Query) -> Evaluation:
        if query.derivatives:
            raise TypeError(
                "this solver needs gradients, and the residuals are Python code: use a solver that "
                "needs values only, or residuals that JAX can trace."
            )
        dtype = np.dtype(jax.tree.leaves(query.x)[0].dtype)
        one = query.mask is None
        count = 1 if query.mask is None else query.mask.shape[0]
        rows = np.full((count, self.size or 0), np.nan, dtype)
        calls = 0
        if is_concrete(query):
            x = jax.tree.map(
                lambda leaf: np.asarray(leaf)[None] if one else np.asarray(leaf), query.x
            )
            asked = np.flatnonzero([True] if query.mask is None else np.asarray(query.mask))
            calls = len(asked)
            points = [jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), x) for i in asked]
            for i, row in zip(asked, self._rows(points), strict=True):
                rows[i] = row
        return _answer(rows[0] if one else rows, np.asarray(calls))

    def _rows(self, points: list[PyTree]) -> list[Any]:
        call = functools.partial(_called, self.residuals, self.size)
        if self.executor is None:
            calls = [functools.partial(call, x) for x in points]
        else:
            calls = [self.executor.submit(call, x).result for x in points]
        rows: list[Any] = []
        for row in calls:
            try:
                rows.append(row())
            except StopIteration:
                raise
            except Exception as error:
                if self.on_error == "raise":
                    raise
                logger.info("the residuals raised %s: %s", type(error).__name__, error)
                rows.append(np.nan)
        return rows


def _called(fun: Callable, size: int | None, x: PyTree) -> np.ndarray:
    """The residuals at one point."""
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(fun(x))]
    flat = np.concatenate(leaves) if leaves else np.zeros(0)
    if flat.shape != (size,) or np.iscomplexobj(flat):
        raise TypeError(f"{flat.size} residuals of {flat.dtype} came back: size is {size}.")
    return flat


@eqx.filter_jit
def _answer(r: Any, calls: Any) -> Evaluation:
    evaluation = exact_evaluation(
        0.5 * jnp.sum(jnp.square(r), axis=-1), None, Work(points=calls, values=calls)
    )
    none = lambda leaf: leaf is None  # noqa: E731
    return eqx.tree_at(lambda e: e.residuals, evaluation, r, is_leaf=none)
