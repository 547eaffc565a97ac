"""Functions with known minima, and faults to put into them.

Which function, and which fault, is an array: all runs of a solver share one compilation. The same
functions in NumPy are made by `python_objective`, with faults that only Python code can have.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from tolerax.minimize import CODES
from tolerax.problems.hessians import Matrix

STEPS = 300
# The minimum of the quadratic; at START its value is 13, at the edge x[0] = 1.5 at best 0.25.
CENTRE, START = (1.0, -2.0), (4.0, 0.0)


def quadratic(x):
    return (x[0] - CENTRE[0]) ** 2 + (x[1] - CENTRE[1]) ** 2


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def quadratic_gradient(x):
    return 2 * (x - np.asarray(CENTRE))


@dataclasses.dataclass(frozen=True)
class Known:
    """A problem with its minimum: `fun` is an index of `FUNCTIONS`."""

    fun: str
    start: tuple[float, float]
    minimum: tuple[float, float]
    lower: tuple[float, float] = (-np.inf, -np.inf)
    upper: tuple[float, float] = (np.inf, np.inf)


PROBLEMS = {
    "quadratic": Known("quadratic", START, CENTRE),
    # Both bounds active; only one; the closed form is the projection, since the Hessian is 2 I.
    "bounded": Known("quadratic", START, (2.0, -1.0), (2.0, -1.0), (6.0, 5.0)),
    "half_bounded": Known("quadratic", START, (2.0, -2.0), (2.0, -3.0), (6.0, 5.0)),
    "rosenbrock": Known("rosenbrock", (-1.2, 1.0), (1.0, 1.0)),
    # On x[0] <= 0.5 the minimum over x[1] is at x[1] = x[0]^2, and the rest falls up to the bound.
    "bounded_rosenbrock": Known("rosenbrock", (-1.2, 0.9), (0.5, 0.25), (-2.0, -2.0), (0.5, 2.0)),
}

FUNCTIONS: dict[str, Callable] = {
    "quadratic": quadratic,
    "rosenbrock": rosenbrock,
    "third": lambda x: jnp.sum(jnp.cosh(x - 1 / 3)),
    "offset": lambda x: 1e6 + quadratic(x),
    "always_nan": lambda x: jnp.nan * x[0],
    "always_inf": lambda x: jnp.inf + 0 * x[0],
    "nan_region": lambda x: jnp.where(x[0] < 1.5, jnp.nan, quadratic(x)),
    "inf_region": lambda x: jnp.where(x[0] < 1.5, jnp.inf, quadratic(x)),
    "nan_start": lambda x: jnp.where(x[0] == START[0], jnp.nan, quadratic(x)),
    "unbounded": lambda x: -jnp.sum(x**4),
    "minus_inf": lambda x: jnp.where(x[0] < 1.5, -jnp.inf, quadratic(x)),
    "linear": lambda x: x[0] + x[1],
}

GRADIENT_FAULTS: dict[str, Callable] = {
    "none": lambda g: g,
    "flipped": lambda g: -g,
    "one_component": lambda g: g * jnp.array([1.0, -1.0], g.dtype),
    "nan": lambda g: g * jnp.nan,
}


class Zoo(eqx.Module):
    """One of `FUNCTIONS`, chosen by an array."""

    kind: jax.Array

    def __call__(self, x):
        return jax.lax.switch(self.kind, list(FUNCTIONS.values()), x)


class ZooGradient(eqx.Module):
    """Its gradient, with a fault chosen by an array."""

    kind: jax.Array
    fault: jax.Array

    def __call__(self, x):
        gradient = jax.grad(Zoo(self.kind))(x)
        return jax.lax.switch(self.fault, list(GRADIENT_FAULTS.values()), gradient)


def objective(name: str, *, fault: str = "none", known: Known | None = None, bounded=True):
    """A function of the zoo as a problem; always with bounds, infinite ones if need be."""
    kind = jnp.asarray(list(FUNCTIONS).index(name))
    index = jnp.asarray(list(GRADIENT_FAULTS).index(fault))
    bounds = None
    if bounded:
        lower = known.lower if known else (-np.inf, -np.inf)
        upper = known.upper if known else (np.inf, np.inf)
        bounds = (jnp.asarray(lower), jnp.asarray(upper))
    return tolerax.Objective(Zoo(kind), gradient=ZooGradient(kind, index), bounds=bounds)


class Python:
    """A function of the zoo in NumPy, in a class so that checkpoints know it by its fields."""

    def __init__(self, name: str):
        self.fun = {"quadratic": quadratic, "rosenbrock": rosenbrock}[name]
        self.slope = {"quadratic": quadratic_gradient, "rosenbrock": rosenbrock_gradient}[name]


def rosenbrock_gradient(x):
    bend = x[1] - x[0] ** 2
    return np.array([-400 * x[0] * bend - 2 * (1 - x[0]), 200 * bend])


def python_objective(name: str, *, fun=None, gradient=None, bounds=None, **options):
    """The same as Python code; `fun` and `gradient` replace its own."""
    known = Python(name)
    return tolerax.Objective(
        fun or known.fun,
        gradient=gradient or known.slope,
        bounds=bounds or (jnp.full(2, -jnp.inf), jnp.full(2, jnp.inf)),
        host=True,
        **options,
    )


class Rough(tolerax.Problem):
    """The quadratic with errors that are honest: shifted by as much as its bounds admit, and never
    below a floor, whatever is asked."""

    floor: jax.Array
    status: Any
    bounds: Any

    def __init__(self, floor, status=tolerax.PointStatus.floor):
        self.floor = jnp.asarray(floor)
        self.status = status
        self.bounds = None

    def evaluate(self, query):
        error = jnp.maximum(query.accuracy.state, self.floor)
        x = query.x
        gradient = 2 * (x - jnp.asarray(CENTRE)) + 0.9 * error * jnp.array([0.6, -0.8])
        value_error = error**2
        zero = jnp.zeros_like(error)
        met = query.accuracy.state >= self.floor
        return tolerax.Evaluation(
            value=quadratic(x) + 0.9 * value_error,
            value_error=value_error,
            gradient=gradient,
            gradient_error=error,
            gradient_error_parts=tolerax.Accuracy(error, zero),
            achieved=tolerax.Accuracy(error, zero),
            work=tolerax.Work(points=1),
            status=tolerax.PointStatus.where(met, tolerax.PointStatus.ok, self.status),
            hessian=Matrix(2 * jnp.eye(2)),
        )


def run(problem, solver, start, **options):
    """`solve` with the number of steps that all runs share."""
    return tolerax.solve(problem, solver, start, max_steps=STEPS, **options)


def true_gradient(name: str, x) -> np.ndarray:
    """The gradient as it should be."""
    return np.asarray(_gradient(jnp.asarray(list(FUNCTIONS).index(name)), jnp.asarray(x)))


_gradient = jax.jit(lambda kind, x: jax.grad(Zoo(kind))(x))


def stationarity(gradient, x, lower, upper) -> float:
    """Norm of the projected gradient, written without the library."""
    pushes_out = ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0))
    return float(np.linalg.norm(np.where(pushes_out, 0, gradient)))


def name_of(status) -> str:
    """The name of a `Status`."""
    return next(name for name in CODES if bool(status == getattr(tolerax.Status, name)))


class Recorded:
    """A Python function that remembers where it was called and what it answered."""

    def __init__(self, fun: Callable):
        self.fun = fun
        self.points: list[np.ndarray] = []
        self.values: list[float] = []

    def __call__(self, x):
        self.points.append(np.array(x))
        self.values.append(np.nan)
        value = self.fun(x)
        self.values[-1] = value
        return value

    @property
    def best(self) -> float:
        """The lowest value that was not NaN or +inf."""
        usable = [v for v in self.values if not np.isnan(v) and v < np.inf]
        return min(usable, default=np.inf)
