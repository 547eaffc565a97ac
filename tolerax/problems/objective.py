"""A plain function of x: values and gradients without error."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tolerax.contracts import Accuracy, Evaluation, Problem, Query, Work, exact_evaluation
from tolerax.status import PointStatus


class HessianOf(eqx.Module):
    """Hessian products of a function at a point, by forward over reverse differentiation."""

    fun: Callable
    x: PyTree

    def mv(self, vector: PyTree) -> PyTree:
        """The Hessian times `vector`."""
        return jax.jvp(jax.grad(self.fun), (self.x,), (vector,))[1]


def _scalar(value: Any) -> Array:
    """`value` as a real scalar array, or a clear error."""
    value = jnp.asarray(value) if not isinstance(value, jax.Array) else value
    if value.shape != ():
        raise TypeError(
            f"the objective returned shape {value.shape}: it must return a scalar. Sum or average "
            "what it returns."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError("the objective returned a complex number: return its real part or modulus.")
    return value


class Objective(Problem):
    """A function `fun(x) -> scalar` as a problem, with error 0.

    **Arguments:**

    - `fun`: the function; x is the pytree that `solve` starts from.
    - `gradient`: `None` differentiates `fun` by JAX; `True` says that `fun` returns
      `(value, gradient)`; a callable returns the gradient; `"2-point"` takes forward differences
      (only with `host=True`), whose error is then reported as an estimate.
    - `bounds`: a pair `(lower, upper)` of pytrees like x, or scalars.
    - `host`: `fun` is Python code that JAX cannot trace; it gets NumPy arrays and is called once a
      point.
    - `on_error`: what an exception of a `host` function means: `"raise"` ends the run with the best
      point attached to the error, `"fail"` marks the point as failed and goes on.

    >>> import jax.numpy as jnp, tolerax
    >>> parabola = tolerax.Objective(lambda x: jnp.sum(x**2), bounds=(1.0, jnp.inf))
    >>> tolerax.solve(parabola, tolerax.InexactLineSearch(), 3 * jnp.ones(2)).x
    Array([1., 1.], dtype=float64)
    """

    fun: Callable
    gradient: Any = None
    bounds: tuple[PyTree, PyTree] | None = None
    is_host: bool = eqx.field(static=True, default=False)
    on_error: str = eqx.field(static=True, default="raise")
    executor: Any = eqx.field(static=True, default=None)

    def __init__(
        self,
        fun: Callable,
        *,
        gradient: Callable | Literal[True, "2-point"] | None = None,
        bounds: tuple[PyTree, PyTree] | None = None,
        host: bool = False,
        on_error: Literal["raise", "fail"] = "raise",
        executor: Any = None,
    ):
        if not callable(fun):
            raise TypeError(f"fun is {fun!r}: give a callable.")
        if on_error not in ("raise", "fail"):
            raise ValueError(f'on_error is {on_error!r}: use "raise" or "fail".')
        if not (gradient is None or gradient is True or callable(gradient)):
            if not (host and gradient == "2-point"):
                raise ValueError(
                    f"gradient is {gradient!r}: use None, True, a callable, or, with host=True, "
                    '"2-point".'
                )
        self.fun = fun
        self.gradient = gradient
        self.bounds = bounds
        self.is_host = host
        self.on_error = on_error
        self.executor = executor

    @property
    def host(self) -> bool:
        return self.is_host

    def on(self, executor: Any) -> "Objective":
        if not self.is_host:
            return super().on(executor)  # pyright: ignore[reportReturnType]
        if not hasattr(executor, "submit"):
            raise TypeError(f"executor is {executor!r}: it must have `submit(fn, *args)`.")
        return Objective(
            self.fun,
            gradient=self.gradient,
            bounds=self.bounds,
            host=True,
            on_error=self.on_error,  # pyright: ignore[reportArgumentType]
            executor=executor,
        )

    def evaluate(self, query: Query) -> Evaluation:
        if self.is_host:
            return self._evaluate_on_host(query)
        if query.mask is None:
            return self._point(query.x, query.derivatives)
        answers = jax.vmap(lambda x: self._point(x, query.derivatives))(query.x)
        total = jax.tree.map(jnp.sum, answers.work)
        return eqx.tree_at(lambda e: e.work, answers, total)

    def _point(self, x: PyTree, derivatives: int) -> Evaluation:
        work = Work(points=1, values=1, gradients=int(derivatives > 0))
        value = lambda x: _scalar(self.fun(x))  # noqa: E731
        if self.gradient is True:
            v, g = self.fun(x)
            v, g = _scalar(v), _like(g, x)
            value = lambda x: _scalar(self.fun(x)[0])  # noqa: E731
        elif derivatives == 0:
            v, g = value(x), None
        elif self.gradient is None:
            v, g = jax.value_and_grad(value)(x)
        else:
            v, g = value(x), _like(self.gradient(x), x)
        hessian = HessianOf(value, x) if derivatives > 1 else None
        return exact_evaluation(v, g if derivatives else None, work, hessian=hessian)

    # -- Python code ------------------------------------------------------------------------------

    def _evaluate_on_host(self, query: Query) -> Evaluation:
        x = jax.tree.map(np.asarray, query.x)
        if query.mask is None:
            return self._assemble([self._call(x, query.derivatives)], x, batch=False)
        count = len(query.mask)
        points = [jax.tree.map(lambda leaf, i=i: np.array(leaf[i]), x) for i in range(count)]
        mask = np.asarray(query.mask)
        if self.executor is None:
            rows = [
                self._call(p, query.derivatives) if m else self._failed(p)
                for p, m in zip(points, mask, strict=True)
            ]
        else:
            futures = [
                self.executor.submit(_call, self.fun, self.gradient, p, query.derivatives)
                if m
                else None
                for p, m in zip(points, mask, strict=True)
            ]
            rows = [
                self._failed(p) if future is None else self._guard(future.result, p)
                for p, future in zip(points, futures, strict=True)
            ]
        return self._assemble(rows, points[0], batch=True)

    def _call(self, x: PyTree, derivatives: int) -> tuple:
        return self._guard(lambda: _call(self.fun, self.gradient, x, derivatives), x)

    def _guard(self, evaluate: Callable[[], tuple], x: PyTree) -> tuple:
        try:
            return evaluate()
        except StopIteration:
            raise
        except Exception:
            if self.on_error == "raise":
                raise
            return self._failed(x)

    def _failed(self, x: PyTree) -> tuple:
        return np.nan, jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), x), 0.0, 1

    def _assemble(self, rows: Iterable[tuple], x: PyTree, batch: bool) -> Evaluation:
        values, gradients, errors, counts = zip(*rows, strict=True)
        dtype = jax.tree.leaves(x)[0].dtype
        value, error = jnp.asarray(values, dtype), jnp.asarray(errors, dtype)
        gradient = None
        if gradients[0] is not None:
            gradient = jax.tree.map(lambda *g: jnp.stack([jnp.asarray(i) for i in g]), *gradients)
        finite = jnp.isfinite(value) | (value == -jnp.inf)
        if gradient is not None:
            for leaf in jax.tree.leaves(gradient):
                finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        if not batch:
            value, error, finite = value[0], error[0], finite[0]
            gradient = jax.tree.map(lambda g: g[0], gradient)
        zero = jnp.zeros_like(value)
        points = sum(counts)
        return Evaluation(
            value=value,
            value_error=zero,
            gradient=gradient,
            gradient_error=error,
            gradient_error_parts=Accuracy(error, zero),
            achieved=Accuracy(zero, zero),
            work=Work(points=points, values=points, gradients=int(gradient is not None)),
            status=PointStatus.where(finite, PointStatus.ok, PointStatus.failed),
            provenance=self.provenance,
        )


def _like(gradient: PyTree, x: PyTree) -> PyTree:
    """The gradient with the shapes and dtype of x, or a clear error."""
    if jax.tree.structure(gradient) != jax.tree.structure(x):
        raise TypeError(
            f"the gradient has structure {jax.tree.structure(gradient)}, x has "
            f"{jax.tree.structure(x)}: return a pytree like x."
        )

    def leaf(g: Any, x: Any) -> Any:
        if jnp.shape(g) != jnp.shape(x):
            raise TypeError(
                f"the gradient has shape {jnp.shape(g)} where x has {jnp.shape(x)}: return an "
                "array like x."
            )
        return g.astype(x.dtype) if hasattr(g, "astype") else np.asarray(g, x.dtype)

    return jax.tree.map(leaf, gradient, x)


def _call(fun: Callable, gradient: Any, x: PyTree, derivatives: int) -> tuple:
    """Value, gradient, gradient error and number of calls of Python code at one point."""
    copy = lambda: jax.tree.map(np.array, x)  # noqa: E731  the user may write into x
    if gradient is True:
        value, g = fun(copy())
        return _float(value), _like(g, x), 0.0, 1
    value = _float(fun(copy()))
    if derivatives == 0:
        return value, None, 0.0, 1
    if callable(gradient):
        return value, _like(gradient(copy()), x), 0.0, 1
    if gradient != "2-point":
        raise TypeError(
            "this solver needs gradients and JAX cannot differentiate Python code: give "
            '`gradient` (`jac` of `minimize`), or "2-point" for finite differences.'
        )
    return _forward_differences(fun, value, x)


def _float(value: Any) -> float:
    if value is None:
        raise TypeError("the objective returned None: it must return a number.")
    if np.iscomplexobj(value):
        raise TypeError("the objective returned a complex number: return its real part or modulus.")
    if np.size(value) != 1:
        raise TypeError(f"the objective returned shape {np.shape(value)}: it must return a scalar.")
    return float(np.asarray(value).reshape(()))


def _forward_differences(fun: Callable, value: float, x: PyTree) -> tuple:
    """Forward differences with a step for the precision of x, and an estimate of their error."""
    leaves, structure = jax.tree.flatten(x)
    gradients, calls = [], 1
    for i, leaf in enumerate(leaves):
        step = np.sqrt(np.finfo(leaf.dtype).eps) * np.maximum(1.0, np.abs(leaf))
        g = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            moved = [np.array(other) for other in leaves]
            moved[i][index] += step[index]
            actual = moved[i][index] - leaf[index]
            g[index] = (_float(fun(structure.unflatten(moved))) - value) / actual
            calls += 1
        gradients.append(g)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
    dtype = leaves[0].dtype
    size = sum(leaf.size for leaf in leaves)
    error = 2 * np.sqrt(np.finfo(dtype).eps * size) * max(1.0, abs(value), float(norm))
    return value, structure.unflatten(gradients), float(error), calls
