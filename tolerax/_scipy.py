"""SciPy's arguments in this library's terms: start, bounds, and the function as a problem."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from tolerax._scipy_constraints import Jacobian, joined
from tolerax.contracts import Problem
from tolerax.problems.objective import Objective
from tolerax.problems.python_code import DIFFERENCES
from tolerax.validation import check_bounds

logger = logging.getLogger("tolerax")


def as_float64(leaf: Any, *, name: str) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        kind = "complex" if array.dtype.kind == "c" else f"of type {array.dtype}"
        raise TypeError(f"{name} is {kind} ({leaf!r}): give real numbers.")
    return array.astype(np.float64)


def start_vector(x0: Any) -> np.ndarray:
    x = as_float64(x0, name="x0")
    if x.ndim > 1:
        raise ValueError(f"x0 has shape {x.shape}: it must have one dimension; use `x0.ravel()`.")
    if x.size == 0:
        raise ValueError("x0 is empty: give at least one variable.")
    return np.atleast_1d(x)


def listed_as_vector(x0: PyTree) -> PyTree:
    """A list of numbers is what SciPy's users write for a vector; any other tree stays as it is."""
    listed = isinstance(x0, list | tuple)
    return start_vector(x0) if listed and all(np.isscalar(entry) for entry in x0) else x0


def bound_vectors(bounds: Any, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """SciPy's bounds as a pair of vectors, or `None` when nothing is bounded."""
    if bounds is None:
        return None
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        sides = bounds.lb, bounds.ub
    else:
        try:
            pairs = [tuple(pair) for pair in bounds]
        except TypeError as error:
            raise TypeError(
                f"bounds is {bounds!r}: give a scipy.optimize.Bounds or a sequence of pairs."
            ) from error
        if len(pairs) != n:
            raise ValueError(f"bounds has {len(pairs)} entries, x0 has {n}: give one pair each.")
        for i, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"bounds[{i}] is {pair!r}: give a pair (low, high).")
        sides = (
            [-np.inf if low is None else low for low, _ in pairs],
            [np.inf if high is None else high for _, high in pairs],
        )
    arrays = []
    for side in sides:
        array = as_float64(side, name="bounds")
        if array.ndim > 1 or array.size not in (1, n):
            raise ValueError(f"bounds have shape {array.shape}, x0 has {n} entries.")
        arrays.append(np.broadcast_to(array, (n,)))
    lower, upper = arrays
    if np.all(lower == -np.inf) and np.all(upper == np.inf):
        return None
    return lower, upper


def inside(x: PyTree, bounds: Any) -> PyTree:
    """x as JAX arrays moved to the nearest point within the bounds, which are checked."""
    if bounds is None:
        return jax.tree.map(jnp.asarray, x)
    # Entries that are not numbers lie nowhere, so only the bounds themselves are checked.
    nowhere = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x)
    lower, upper = check_bounds(bounds, nowhere) or (-np.inf, np.inf)
    moved = jax.tree.map(lambda leaf, low, high: jnp.clip(leaf, low, high), x, lower, upper)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(moved), strict=True
    ):
        changed = np.flatnonzero((old != new) & ~np.isnan(old))
        if changed.size:
            i = int(changed[0])
            from scipy.optimize import OptimizeWarning

            warnings.warn(
                f"x0{jax.tree_util.keystr(path)} lies outside its bounds in {changed.size} of "
                f"{old.size} entries (entry {i} is {old.ravel()[i]}): the search starts from the "
                f"nearest point within ({np.ravel(new)[i]}).",
                OptimizeWarning,
                stacklevel=4,
            )
    return moved


def in_float64(tree: Any) -> Any:
    """Arrays that were made while JAX computed in float32, cast."""

    def cast(leaf: Any) -> Any:
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float64) if floating else leaf

    return jax.tree.map(cast, tree)


# -- the problem ----------------------------------------------------------------------------------


def is_empty(value: Any) -> bool:
    """Whether an argument of SciPy's `minimize` says nothing."""
    return value is None or (isinstance(value, Sequence | dict) and len(value) == 0)


def given_problem(problem: Problem, x: PyTree, bounds: Any, others: dict[str, Any]) -> Problem:
    """A problem of this library, with bounds when it has none of its own."""
    for name, value in others.items():
        if not is_empty(value):
            raise ValueError(f"{name} is given, but fun is a problem: leave {name} out.")
    if bounds is None:
        return problem
    if problem.bounds is not None:
        raise ValueError("bounds are given, but the problem has bounds: give one of them.")
    if not isinstance(x, np.ndarray) or x.ndim != 1:
        raise ValueError("bounds are given, but x0 is not a vector: give them to the problem.")
    return eqx.tree_at(
        lambda p: p.bounds,
        problem,
        bound_vectors(bounds, x.size),
        is_leaf=lambda leaf: leaf is None,
    )


class NotAPairError(TypeError):
    """A function said to return value and gradient does not."""


class Function(eqx.Module):
    """`fun(x, *args)` as a function of x; as in SciPy, values of size 1 count as scalars."""

    fun: Callable
    args: tuple
    has_gradient: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Any) -> Any:
        out = self.fun(x, *self.args)
        if not self.has_gradient:
            return _scalar(out)
        try:
            value, gradient = out
        except (TypeError, ValueError) as error:
            raise NotAPairError(
                "jac is True, so fun must return (value, gradient), but it does not."
            ) from error
        return _scalar(value), _fitted(gradient, x)


class Gradient(eqx.Module):
    """`jac(x, *args)` as a function of x; lists and rows become arrays like x."""

    jac: Callable
    args: tuple

    def __call__(self, x: Any) -> Any:
        return _fitted(self.jac(x, *self.args), x)


class Curvature(eqx.Module):
    """`hess(x, *args)` as a function of x; what is sparse or a list becomes an array."""

    hess: Callable
    args: tuple

    def __call__(self, x: Any) -> Any:
        matrix = self.hess(x, *self.args)
        matrix = matrix.toarray() if hasattr(matrix, "toarray") else matrix
        return np.asarray(matrix) if isinstance(x, np.ndarray) else jnp.asarray(matrix)


class Product(eqx.Module):
    """`hessp(x, v, *args)` as a function of x and v."""

    hessp: Callable
    args: tuple

    def __call__(self, x: Any, v: Any) -> Any:
        return _fitted(self.hessp(x, v, *self.args), x)


def _second(hess: Any, hessp: Any) -> tuple[Any, Any]:
    """What is given of second derivatives; strings of SciPy ask for differences, which are the
    default here. As there, `hess` wins over `hessp`."""
    if isinstance(hess, str) and hess in ("2-point", "3-point", "cs"):
        hess = None
    if not (hess is None or callable(hess)):
        raise ValueError(
            f"hess is {hess!r}: give a callable that returns the matrix, or leave it out; there "
            "are no quasi-Newton updates."
        )
    return hess, None if hess is not None else hessp


def _scalar(value: Any) -> Any:
    return value.reshape(()) if np.ndim(value) > 0 and np.size(value) == 1 else value


def _fitted(gradient: Any, x: Any) -> Any:
    array = np.asarray(gradient) if isinstance(x, np.ndarray) else jnp.asarray(gradient)
    return array.reshape(x.shape) if array.size == x.size else array


def function_problem(
    fun: Any,
    x: np.ndarray,
    args: tuple,
    jac: Any,
    second: tuple[Any, Any],
    bounds: Any,
    constraints: Any,
    on_error: Any,
    may_difference: bool,
) -> tuple[Objective, Exception | None]:
    """A plain function as a problem: compiled where JAX can trace it, else called as Python code;
    then also why."""
    if not callable(fun):
        raise TypeError(f"fun is {fun!r}: give a callable or a problem.")
    jac = None if jac is False else jac
    known = jac in DIFFERENCES if isinstance(jac, str) else jac is None or jac is True
    if not (known or callable(jac)):
        raise ValueError(
            f"jac is {jac!r}: use None, True, a callable, or one of "
            f"{', '.join(map(repr, DIFFERENCES))}."
        )
    reason = None
    within: dict[str, Any] = {}
    if not is_empty(constraints):
        together, limits = joined(constraints, x)
        within = {"constraints": together, "constraint_bounds": limits}
    hess, hessp = _second(*second)
    if not isinstance(jac, str):
        value = Function(*_held(fun, args), jac is True)
        derivative: Any = Gradient(*_held(jac, args)) if callable(jac) else jac
        reason = _why_not_traceable(value, x)
        if reason is None and callable(derivative):
            reason = _why_not_traceable(derivative, x)
        by_jax = reason is None and derivative is None
        curved: dict[str, Any] = {}
        if hess is not None:
            curved["hessian"] = Curvature(*_held(hess, args))
            if reason is None:
                reason = _why_not_traceable(curved["hessian"], x)
        if hessp is not None:
            curved["hessian_product"] = Product(*_held(hessp, args))
            if reason is None:
                reason = _why_not_traceable(lambda v: curved["hessian_product"](v, v), x)
        if reason is None and within:
            reason = _why_not_traceable(within["constraints"], x)
        if reason is None:
            if on_error is not None:
                raise ValueError(
                    "on_error is given, but fun is compiled by JAX and cannot raise: leave it out."
                )
            return Objective(value, gradient=derivative, bounds=bounds, **within, **curved), None
        if by_jax:
            # Only second derivatives or constraints are Python code.
            jac = jax.jit(jax.grad(value))
            fun, args = jax.jit(value), ()
    if reason is not None:
        why = f"{type(reason).__name__}: {reason}".split("\n")[0]
        logger.info("fun is called as Python code, point by point: JAX cannot trace it (%s)", why)
    value = Function(fun, args, jac is True)
    gradient: Any = Gradient(jac, args) if callable(jac) else jac
    if gradient is None and may_difference:
        gradient = "2-point"
    on_error = "raise" if on_error is None else on_error
    if within:
        within["constraint_jacobian"] = Jacobian(within["constraints"].parts, bounds)
    problem = Objective(
        value,
        gradient=gradient,
        bounds=bounds,
        hessian=None if hess is None else Curvature(hess, args),
        hessian_product=None if hessp is None else Product(hessp, args),
        host=True,
        on_error=on_error,
        **within,
    )
    return problem, reason


def _held(fun: Callable, args: tuple) -> tuple[Callable, tuple]:
    """Function and arguments such that arrays are arguments of the compiled function, not constants
    in it."""

    def hold(leaf: Any) -> Any:
        is_numbers = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"
        return jnp.asarray(leaf) if is_numbers else leaf

    held = jax.tree.map(hold, args)
    try:
        hash(tuple(leaf for leaf in jax.tree.leaves(held) if not eqx.is_array(leaf)))
    except TypeError:
        return lambda x: fun(x, *args), ()
    return fun, held


def _why_not_traceable(fun: Callable, x: np.ndarray) -> Exception | None:
    """`None` when JAX can trace `fun` and gets the same program twice, else the reason.

    A program that differs the second time depends on something else than its arguments (random
    numbers, counters), which compiling would freeze."""
    programs = []
    ignores_x = []

    def traced(x: Any) -> Any:
        out = fun(x)
        ignores_x.append(not any(isinstance(o, Tracer) for o in jax.tree.leaves(out)))
        return out

    try:
        for _ in range(2):
            # A new function each time: JAX remembers the program of one that it has seen.
            program = jax.make_jaxpr(lambda x: traced(x))(jnp.asarray(x))
            programs.append((str(program.jaxpr), [np.asarray(c) for c in program.consts]))
    except NotAPairError:
        raise
    except Exception as error:
        return error
    if any(ignores_x):
        return ValueError("the value does not depend on x in a way that JAX sees.")
    (text, constants), (text_again, constants_again) = programs
    same = text == text_again and all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(constants, constants_again, strict=True)
    )
    return None if same else ValueError("two calls gave two programs: fun is not a pure function.")


def all_fixed(x: PyTree, bounds: Any) -> bool:
    if bounds is None:
        return False
    lower, upper = check_bounds(bounds, x) or (x, x)
    pairs = zip(jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True)
    return all(bool(jnp.all(low == high)) for low, high in pairs)
