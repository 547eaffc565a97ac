"""SciPy's constraint objects in this library's terms: one function and one pair of bounds."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Constraints(eqx.Module):
    """Several constraint functions as one, `x -> (m,)`; each is `(fun, args)`."""

    parts: tuple[tuple[Callable, tuple], ...]

    def __call__(self, x: Any) -> Any:
        where: Any = np if isinstance(x, np.ndarray) else jnp
        values = [where.ravel(where.asarray(fun(x, *args))) for fun, args in self.parts]
        return where.concatenate(values)


class Linear(eqx.Module):
    """`A x`."""

    matrix: Array

    def __call__(self, x: Any) -> Any:
        return self.matrix @ x


def joined(constraints: Any, x: np.ndarray) -> tuple[Constraints, tuple[np.ndarray, np.ndarray]]:
    """What SciPy takes as `constraints`, as one function and the bounds of its values.

    The sizes are found by evaluating each at x, abstractly where JAX can trace it.
    """
    single = isinstance(constraints, Mapping) or hasattr(constraints, "lb")
    listed = [constraints] if single else list(constraints)
    parts, lower, upper = [], [], []
    for i, constraint in enumerate(listed):
        fun, args, low, high = _read(constraint, f"constraints[{i}]", x.size)
        m = _size(fun, args, x)
        for side, value in ((lower, low), (upper, high)):
            value = np.asarray(value, float)
            if value.ndim > 1 or value.size not in (1, m):
                raise ValueError(
                    f"constraints[{i}] has {m} values at x0 and bounds of shape {value.shape}: "
                    "give one bound, or one for each."
                )
            side.append(np.broadcast_to(value, (m,)))
        parts.append((fun, args))
    return Constraints(tuple(parts)), (np.concatenate(lower), np.concatenate(upper))


def _read(constraint: Any, name: str, n: int) -> tuple[Callable, tuple, Any, Any]:
    """Function, arguments and bounds of one constraint."""
    if isinstance(constraint, Mapping):
        kind, fun = str(constraint.get("type", "")).lower(), constraint.get("fun")
        if kind not in ("eq", "ineq"):
            raise ValueError(f'{name} has type {constraint.get("type")!r}: use "eq" or "ineq".')
        unknown = sorted(set(constraint) - {"type", "fun", "jac", "args"})
        if unknown:
            raise ValueError(f"{name} has the key {unknown[0]!r}: use type, fun, jac, args.")
        args = constraint.get("args", ())
        args = args if isinstance(args, tuple) else (args,)
        return _callable(fun, name), args, 0.0, 0.0 if kind == "eq" else np.inf
    if not (hasattr(constraint, "lb") and hasattr(constraint, "ub")):
        raise TypeError(
            f"{name} is {constraint!r}: give a dict, a NonlinearConstraint or a LinearConstraint."
        )
    if np.any(getattr(constraint, "keep_feasible", False)):
        raise ValueError(
            f"{name} has keep_feasible=True, which cannot be promised for general constraints: "
            "leave it out, or write limits of single variables as bounds."
        )
    if hasattr(constraint, "A"):
        matrix = constraint.A.toarray() if hasattr(constraint.A, "toarray") else constraint.A
        matrix = np.atleast_2d(np.asarray(matrix, float))
        if matrix.shape[1] != n:
            raise ValueError(f"{name}: A has shape {matrix.shape}, x0 has {n} entries.")
        return Linear(jnp.asarray(matrix)), (), constraint.lb, constraint.ub
    return _callable(constraint.fun, name), (), constraint.lb, constraint.ub


def _callable(fun: Any, name: str) -> Callable:
    if not callable(fun):
        raise TypeError(f"{name}: fun is {fun!r}: give a callable.")
    return fun


def _size(fun: Callable, args: tuple, x: np.ndarray) -> int:
    try:
        out = jax.eval_shape(lambda x: jnp.asarray(fun(x, *args)), jnp.asarray(x))
    except Exception:
        out = np.asarray(fun(x.copy(), *args))
    return int(np.prod(out.shape))
