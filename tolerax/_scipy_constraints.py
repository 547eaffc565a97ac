"""SciPy's constraint objects in this library's terms: one function and one pair of bounds."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tolerax.problems.differences import flat_bounds, jacobian_by_differences
from tolerax.problems.python_code import DIFFERENCES


class Part(eqx.Module):
    """One constraint function and how to differentiate it where JAX cannot: a callable that returns
    the matrix, or `"2-point"` or `"3-point"`."""

    fun: Callable
    args: tuple
    jac: Any

    def __call__(self, x: Any) -> Any:
        where: Any = np if isinstance(x, np.ndarray) else jnp
        return where.ravel(where.asarray(self.fun(x, *self.args)))


class Constraints(eqx.Module):
    """Several constraint functions as one, `x -> (m,)`."""

    parts: tuple[Part, ...]

    def __call__(self, x: Any) -> Any:
        where: Any = np if isinstance(x, np.ndarray) else jnp
        return where.concatenate([part(x) for part in self.parts])


class Jacobian(eqx.Module):
    """The derivatives of Python constraints, shape `(m, n)`, at NumPy arrays."""

    parts: tuple[Part, ...]
    bounds: tuple[np.ndarray, np.ndarray] | None

    @property
    def by_differences(self) -> bool:
        """Whether some of them are found by differences."""
        return any(isinstance(part.jac, str) for part in self.parts)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        lower, upper = flat_bounds(self.bounds, [x])
        rows = []
        for part in self.parts:
            if callable(part.jac):
                given: Any = part.jac(x.copy(), *part.args)
                given = given.toarray() if hasattr(given, "toarray") else given
                rows.append(np.atleast_2d(np.asarray(given, float)))
                continue
            at = lambda moved, part=part: np.asarray(part(moved.copy()), float)  # noqa: E731
            central = part.jac == "3-point"
            rows.append(
                jacobian_by_differences(at, x, at(x), lower=lower, upper=upper, central=central)
            )
        return np.concatenate(rows)


class Linear(eqx.Module):
    """`A x`."""

    matrix: Array

    def __call__(self, x: Any) -> Any:
        return np.asarray(self.matrix) @ x if isinstance(x, np.ndarray) else self.matrix @ x


class LinearRows(eqx.Module):
    """The Jacobian of `A x`."""

    matrix: Array

    def __call__(self, x: np.ndarray) -> np.ndarray:
        del x
        return np.asarray(self.matrix)


def joined(constraints: Any, x: np.ndarray) -> tuple[Constraints, tuple[np.ndarray, np.ndarray]]:
    """What SciPy takes as `constraints`, as one function and the bounds of its values.

    The sizes are found by evaluating each at x, abstractly where JAX can trace it.
    """
    single = isinstance(constraints, Mapping) or hasattr(constraints, "lb")
    listed = [constraints] if single else list(constraints)
    parts, lower, upper = [], [], []
    for i, constraint in enumerate(listed):
        part, low, high = _read(constraint, f"constraints[{i}]", x.size)
        m = _size(part, x)
        for side, value in ((lower, low), (upper, high)):
            value = np.asarray(value, float)
            if value.ndim > 1 or value.size not in (1, m):
                raise ValueError(
                    f"constraints[{i}] has {m} values at x0 and bounds of shape {value.shape}: "
                    "give one bound, or one for each."
                )
            side.append(np.broadcast_to(value, (m,)))
        parts.append(part)
    return Constraints(tuple(parts)), (np.concatenate(lower), np.concatenate(upper))


def _read(constraint: Any, name: str, n: int) -> tuple[Part, Any, Any]:
    """Function and bounds of one constraint."""
    if isinstance(constraint, Mapping):
        kind, fun = str(constraint.get("type", "")).lower(), constraint.get("fun")
        if kind not in ("eq", "ineq"):
            raise ValueError(f'{name} has type {constraint.get("type")!r}: use "eq" or "ineq".')
        unknown = sorted(set(constraint) - {"type", "fun", "jac", "args"})
        if unknown:
            raise ValueError(f"{name} has the key {unknown[0]!r}: use type, fun, jac, args.")
        args = constraint.get("args", ())
        args = args if isinstance(args, tuple) else (args,)
        jac = _derivative(constraint.get("jac"), name)
        return Part(_callable(fun, name), args, jac), 0.0, 0.0 if kind == "eq" else np.inf
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
        matrix = jnp.asarray(matrix)
        return Part(Linear(matrix), (), LinearRows(matrix)), constraint.lb, constraint.ub
    _check_unused(constraint, name)
    jac = _derivative(getattr(constraint, "jac", None), name)
    return Part(_callable(constraint.fun, name), (), jac), constraint.lb, constraint.ub


def _check_unused(constraint: Any, name: str) -> None:
    """Refuse what would change results, and say what only takes longer without."""
    from scipy.optimize import HessianUpdateStrategy

    step = getattr(constraint, "finite_diff_rel_step", None)
    if step is not None:
        raise ValueError(
            f"{name} has finite_diff_rel_step={step!r}, and steps of differences are chosen here: "
            "leave it out, or give `jac`."
        )
    # SciPy's default is an update like our own.
    hess = getattr(constraint, "hess", None)
    unused = [] if hess is None or isinstance(hess, HessianUpdateStrategy) else ["hess"]
    if getattr(constraint, "finite_diff_jac_sparsity", None) is not None:
        unused.append("finite_diff_jac_sparsity")
    for option in unused:
        warnings.warn(
            f"{name} has {option}, which is not used: JAX finds second derivatives where it can "
            "trace the functions, else they are learned from gradients.",
            UserWarning,
            stacklevel=2,
        )


def _derivative(jac: Any, name: str) -> Any:
    """How Python constraints are differentiated; SciPy's default are forward differences."""
    jac = "2-point" if jac is None or jac is False else jac
    if not (callable(jac) or jac in DIFFERENCES):
        raise ValueError(
            f"{name}: jac is {jac!r}: give a callable that returns the matrix, or one of "
            f"{', '.join(map(repr, DIFFERENCES))}."
        )
    return jac


def _callable(fun: Any, name: str) -> Callable:
    if not callable(fun):
        raise TypeError(f"{name}: fun is {fun!r}: give a callable.")
    return fun


def _size(part: Part, x: np.ndarray) -> int:
    try:
        out = jax.eval_shape(part, jnp.asarray(x))
    except Exception:
        out = part(x.copy())
    return int(np.prod(out.shape))
