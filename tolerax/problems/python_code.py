"""One point of an objective that is Python code: called, checked, differentiated by differences.

Everything here is NumPy and can be sent to another process.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tolerax.contracts import Query
from tolerax.problems.differences import differences, flat_bounds, jacobian_by_differences
from tolerax.problems.hessians import host_hessian
from tolerax.status import PointStatus

DIFFERENCES = ("2-point", "3-point")


class Wanted(NamedTuple):
    """What is asked at every point: the gradient and how to get it, within which bounds, and the
    tolerance on its error; the constraints and their Jacobian. With a `residual_count` the function
    returns so many residuals, and the value is half the sum of their squares."""

    gradient: Any
    derivatives: int
    bounds: Any
    tolerance: float
    constraints: Callable | None = None
    constraint_count: int = 0
    hessian: Callable | None = None
    hessian_product: Callable | None = None
    constraint_jacobian: Any = None
    residual_count: int | None = None


# `lost`: the point killed its worker.
Outcome = Literal["answered", "raised", "timed_out", "lost"]


class Row(NamedTuple):
    """What is known at one point, how often the function was called for it, and how that went."""

    value: float
    value_error: float
    gradient: PyTree
    gradient_error: float
    calls: int
    outcome: Outcome = "answered"
    error: str = ""
    constraints: np.ndarray | None = None
    hessian: np.ndarray | None = None
    jacobian: np.ndarray | None = None
    residuals: np.ndarray | None = None


def points_of(query: Query) -> tuple[list[PyTree], list[bool]]:
    """The points of a question as NumPy arrays, and which of them are asked for."""
    leaves, structure = jax.tree.flatten(query.x)
    leaves = [np.asarray(leaf) for leaf in leaves]
    if query.mask is None:
        return [structure.unflatten(leaves)], [True]
    mask = np.asarray(query.mask).tolist()
    rows = zip(*leaves, strict=True)
    return [structure.unflatten([np.asarray(part) for part in row]) for row in rows], mask


def failed(x: PyTree, derivatives: int, calls: int = 1) -> Row:
    """The row of a point without a usable value."""
    gradient = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), x) if derivatives else None
    row = Row(np.nan, 0.0, gradient, 0.0, calls)
    if derivatives < 2:
        return row
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(x))
    return row._replace(hessian=np.full((size, size), np.nan))


def call(fun: Callable, x: PyTree, wanted: Wanted) -> Row:
    """Value, derivatives and constraints at one point. Functions get copies, since they may write
    into them."""
    row = _called(fun, x, wanted)
    if wanted.derivatives > 1:
        row = _with_hessian(row, fun, x, wanted)
    if wanted.constraints is None or not np.isfinite(row.value):
        return row
    values = _constraints(x, wanted)
    jacobian = _constraint_jacobian(x, values, wanted) if wanted.derivatives else None
    return row._replace(constraints=values, jacobian=jacobian)


def _constraints(x: PyTree, wanted: Wanted) -> np.ndarray:
    assert wanted.constraints is not None
    leaves = jax.tree.leaves(wanted.constraints(jax.tree.map(np.array, x)))
    values = np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves] or [np.zeros(0)])
    if values.size != wanted.constraint_count or np.iscomplexobj(values):
        raise TypeError(
            f"{values.size} constraints of type {values.dtype} came back: constraint_bounds has "
            f"{wanted.constraint_count} real ones."
        )
    return values.astype(float)


def _constraint_jacobian(x: PyTree, values: np.ndarray, wanted: Wanted) -> np.ndarray:
    """The derivatives of the constraints over the flat x, as given or by differences."""
    flat, tree = _raveled(x)
    if callable(wanted.constraint_jacobian):
        matrix = np.asarray(wanted.constraint_jacobian(tree(flat)))
        if matrix.shape != (values.size, flat.size) or np.iscomplexobj(matrix):
            raise TypeError(
                f"the Jacobian of the constraints has shape {matrix.shape} and type "
                f"{matrix.dtype}: return a real matrix of shape {(values.size, flat.size)}, a row "
                "for each constraint."
            )
        return matrix.astype(float)
    lower, upper = flat_bounds(wanted.bounds, jax.tree.leaves(x))
    return jacobian_by_differences(
        lambda at: _constraints(tree(at), wanted),
        flat,
        values,
        lower=lower,
        upper=upper,
        central=wanted.constraint_jacobian == "3-point",
    )


def _with_hessian(row: Row, fun: Callable, x: PyTree, wanted: Wanted) -> Row:
    """The row with a Hessian, NaN where there is no gradient."""
    flat, tree = _raveled(x)
    g = _raveled(row.gradient)[0]
    if not (np.isfinite(row.value) and np.all(np.isfinite(g))):
        return row._replace(hessian=failed(x, 2).hessian)
    more = 0

    def gradient(at: np.ndarray) -> np.ndarray:
        nonlocal more
        if wanted.gradient is True:
            more += 1
            return _raveled(like(fun(tree(at))[1], x))[0]
        return _raveled(like(wanted.gradient(tree(at)), x))[0]

    def ravel_product(at: np.ndarray, v: np.ndarray) -> np.ndarray:
        assert wanted.hessian_product is not None
        return _raveled(wanted.hessian_product(tree(at), tree(v)))[0]

    matrix = wanted.hessian
    hessian = host_hessian(
        gradient if wanted.gradient is True or callable(wanted.gradient) else None,
        None if matrix is None else lambda at: matrix(tree(at)),
        None if wanted.hessian_product is None else ravel_product,
        flat,
        g,
        *flat_bounds(wanted.bounds, jax.tree.leaves(x)),
    )
    return row._replace(hessian=hessian, calls=row.calls + more)


def _raveled(x: PyTree) -> tuple[np.ndarray, Callable[[np.ndarray], PyTree]]:
    """A pytree of arrays as one vector, and the way back to new arrays."""
    leaves, structure = jax.tree.flatten(x)
    leaves = [np.asarray(leaf) for leaf in leaves]
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def tree(flat: np.ndarray) -> PyTree:
        parts = np.split(flat, sizes)
        fitted = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, [np.array(part) for part in fitted])

    return np.concatenate([leaf.ravel() for leaf in leaves]), tree


def _called(fun: Callable, x: PyTree, wanted: Wanted) -> Row:
    leaves = jax.tree.leaves(x)
    dtype = leaves[0].dtype
    copy = lambda: jax.tree.map(np.array, x)  # noqa: E731
    if wanted.residual_count is not None:
        r = _residuals(fun(copy()), wanted.residual_count)
        return Row(0.5 * float(r @ r), 0.0, None, 0.0, 1, residuals=r)
    if wanted.gradient is True:
        value, gradient = fun(copy())
        value, error = number(value, dtype)
        return Row(value, error, like(gradient, x) if wanted.derivatives else None, 0.0, 1)
    value, error = number(fun(copy()), dtype)
    if wanted.derivatives == 0:
        return Row(value, error, None, 0.0, 1)
    if value == -np.inf:  # a value, but one without a gradient
        return Row(value, 0.0, jax.tree.map(np.zeros_like, x), 0.0, 1)
    if not np.isfinite(value):
        return failed(x, 1)._replace(value=value)
    if callable(wanted.gradient):
        return Row(value, error, like(wanted.gradient(copy()), x), 0.0, 1)

    flat, tree = _raveled(x)
    lower, upper = flat_bounds(wanted.bounds, leaves)
    precision = max(float(np.finfo(dtype).eps), error / abs(value) if value else 0.0)
    found = differences(
        lambda flat: number(fun(tree(flat)), dtype)[0],
        flat,
        value,
        precision=precision,
        lower=lower,
        upper=upper,
        tolerance=wanted.tolerance,
        central=wanted.gradient == "3-point",
    )
    gradient = tree(found.gradient.astype(dtype))
    return Row(value, error, gradient, found.error, 1 + found.calls)


def _residuals(returned: Any, count: int) -> np.ndarray:
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(returned)]
    flat = np.concatenate(leaves) if leaves else np.zeros(0)
    if flat.shape != (count,) or flat.dtype.kind not in "fiub":
        raise TypeError(f"{flat.size} residuals of {flat.dtype} came back: size is {count}.")
    return flat.astype(float)


def number(value: Any, dtype: Any) -> tuple[float, float]:
    """A returned value as a float and its rounding error beyond that of `dtype`."""
    if value is None:
        raise TypeError("the objective returned None: it must return a number.")
    array = np.asarray(value)
    if array.dtype.kind in "USmM":
        raise TypeError(f"the objective returned {value!r}: it must return a number.")
    if np.iscomplexobj(array):
        raise TypeError("the objective returned a complex number: return its real part or modulus.")
    if array.size != 1:
        raise TypeError(f"the objective returned shape {array.shape}: it must return a scalar.")
    result = float(array.reshape(()))
    error = rounding(array.dtype, dtype) * abs(result) if np.isfinite(result) else 0.0
    return result, error


@functools.lru_cache
def rounding(value_dtype: Any, x_dtype: Any) -> float:
    """The relative precision of values whose type is coarser than that of x, else 0."""
    if not jnp.issubdtype(value_dtype, jnp.floating):
        return 0.0
    eps = float(jnp.finfo(value_dtype).eps)
    return eps if eps > float(jnp.finfo(x_dtype).eps) else 0.0


def like(gradient: PyTree, x: PyTree) -> PyTree:
    """The gradient with the shapes and dtype of x, or a clear error."""
    if jax.tree.structure(gradient) != jax.tree.structure(x):
        raise TypeError(
            f"the gradient has structure {jax.tree.structure(gradient)}, x has "
            f"{jax.tree.structure(x)}: return a pytree like x."
        )

    def leaf(g: Any, x: Any) -> Any:
        if np.shape(g) != np.shape(x):
            raise TypeError(
                f"the gradient has shape {np.shape(g)} where x has {np.shape(x)}: return an "
                "array like x."
            )
        if np.iscomplexobj(g):
            raise TypeError("the gradient is complex: return its real part.")
        return g.astype(x.dtype) if hasattr(g, "astype") else np.asarray(g, x.dtype)

    return jax.tree.map(leaf, gradient, x)


def point_status(finite: Array, timed_out: Array) -> Any:
    """The status of each point that Python code was asked for."""

    def outcome(finite: Array, timed_out: Array) -> Any:
        failed = PointStatus.where(timed_out, PointStatus.timed_out, PointStatus.failed)
        return PointStatus.where(finite, PointStatus.ok, failed)

    return jax.vmap(outcome)(finite, timed_out) if finite.ndim else outcome(finite, timed_out)


def names_host(method: Callable) -> Callable:
    """A method that calls a user's function: errors of code that JAX cannot trace name `host`."""

    @functools.wraps(method)
    def named(*args: Any) -> Any:
        try:
            return method(*args)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            error.add_note(
                "JAX cannot trace this function: give `host=True` to `Objective` for code that "
                "needs numbers, or write it with `jax.numpy`."
            )
            raise

    return named
