"""Twenty smooth unconstrained functions, n from 2 to 1000, with the values of their minima.

Sums of squares of the classical collection (Moré, Garbow and Hillstrom, ACM TOMS 7, 1981; "MGH"
below with its number), functions of the CUTEst collection, and convex problems that people bring:
regression, log-sum-exp, an ill-conditioned quadratic, a minimal surface. Starts are the published
ones. Minima that have no closed form are found once by a dense Newton method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Point = Float[Array, " n"]
Value = Float[Array, ""]

# MGH 26, n = 10: the published start lies in the basin of this local minimum (MGH table it as
# 2.79506e-5), where descent methods end; found with a trust-region Newton method.
TRIGONOMETRIC = 2.795056121880e-5


@dataclass(frozen=True)
class Smooth:
    """A function, its published start, and its least value (`None`: convex, found by Newton)."""

    name: str
    fun: Callable[[Point], Value]
    x0: np.ndarray
    least: float | None = 0.0

    @property
    def n(self) -> int:
        """How many variables."""
        return self.x0.size

    @cached_property
    def minimum(self) -> float:
        """The least value."""
        return newton_minimum(self.fun, self.x0) if self.least is None else self.least


def newton_minimum(fun: Callable[[Point], Value], x0: np.ndarray, steps: int = 200) -> float:
    """The least value of a convex function: Newton steps, the Hessian shifted by sqrt(|g|), which
    keeps far steps sensible and the convergence superlinear, with step halving. Dense algebra."""
    value, gradient, hessian = jax.jit(fun), jax.jit(jax.grad(fun)), jax.jit(jax.hessian(fun))
    x = np.asarray(x0)
    f = float(value(x))
    for _ in range(steps):
        g = np.asarray(gradient(x))
        shift = 1e-3 * np.sqrt(np.linalg.norm(g)) * np.eye(g.size)
        d = -np.linalg.solve(np.asarray(hessian(x)) + shift, g)
        slope = float(g @ d)
        if 0 <= -slope <= 1e-15 * max(1.0, abs(f)):
            return f
        t = 1.0
        while t > 1e-12 and not float(value(x + t * d)) <= f + 1e-4 * t * slope:
            t /= 2
        trial = float(value(x + t * d))
        if not trial < f:  # the decrease is below what float64 resolves
            return f
        x, f = x + t * d, trial
    raise RuntimeError(f"no minimum found in {steps} Newton steps; is the function convex?")


def rosenbrock(x: Point) -> Value:
    """Chained Rosenbrock function (MGH 1 for n = 2)."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(x: Point) -> Value:
    """MGH 5."""
    powers = jnp.arange(1, 4)
    return jnp.sum((jnp.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** powers)) ** 2)


def brown_badly_scaled(x: Point) -> Value:
    """MGH 4: variables that differ by twelve orders of magnitude at the minimum."""
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def himmelblau(x: Point) -> Value:
    """Four minima of equal value."""
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def helical_valley(x: Point) -> Value:
    """MGH 7, its angle taken continuous across the start."""
    angle = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    radius = jnp.sqrt(x[0] ** 2 + x[1] ** 2)
    return 100 * ((x[2] - 10 * angle) ** 2 + (radius - 1) ** 2) + x[2] ** 2


def wood(x: Point) -> Value:
    """MGH 14."""
    a, b, c, d = x
    return (
        100 * (b - a**2) ** 2
        + (1 - a) ** 2
        + 90 * (d - c**2) ** 2
        + (1 - c) ** 2
        + 10 * (b + d - 2) ** 2
        + (b - d) ** 2 / 10
    )


def powell_singular(x: Point) -> Value:
    """Extended Powell function (MGH 22): the Hessian is singular at the minimum."""
    a, b, c, d = x.reshape(-1, 4).T
    return jnp.sum((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4)


def penalty_one(x: Point) -> Value:
    """MGH 23."""
    return 1e-5 * jnp.sum((x - 1) ** 2) + (jnp.sum(x**2) - 0.25) ** 2


def variably_dimensioned(x: Point) -> Value:
    """MGH 25."""
    weighted = jnp.sum(jnp.arange(1, x.size + 1) * (x - 1))
    return jnp.sum((x - 1) ** 2) + weighted**2 + weighted**4


def trigonometric(x: Point) -> Value:
    """MGH 26."""
    i = jnp.arange(1, x.size + 1)
    cosines = jnp.cos(x)
    return jnp.sum((x.size - jnp.sum(cosines) + i * (1 - cosines) - jnp.sin(x)) ** 2)


def discrete_boundary_value(x: Point) -> Value:
    """MGH 28: finite differences for u'' = (u + t + 1)^3 / 2."""
    h = 1 / (x.size + 1)
    t = h * jnp.arange(1, x.size + 1)
    padded = jnp.pad(x, 1)
    return jnp.sum((2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2) ** 2)


def broyden_tridiagonal(x: Point) -> Value:
    """MGH 30."""
    padded = jnp.pad(x, 1)
    return jnp.sum(((3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1) ** 2)


def dixon_price(x: Point) -> Value:
    """Dixon and Price's chain (least value 0)."""
    i = jnp.arange(2, x.size + 1)
    return (x[0] - 1) ** 2 + jnp.sum(i * (2 * x[1:] ** 2 - x[:-1]) ** 2)


def engval(x: Point) -> Value:
    """ENGVAL1 of CUTEst, convex."""
    return jnp.sum((x[:-1] ** 2 + x[1:] ** 2) ** 2 - 4 * x[:-1] + 3)


def nesterov_worst(x: Point) -> Value:
    """Nesterov's worst function for first-order methods (Introductory Lectures, 2.1.2), L = 4."""
    return (x[0] ** 2 + jnp.sum((x[:-1] - x[1:]) ** 2) + x[-1] ** 2) / 2 - x[0]


def minimal_surface(side: int) -> Callable[[Point], Value]:
    """Area of a graph over the unit square with prescribed boundary heights, side^2 unknowns."""
    t = np.linspace(0, 1, side + 2)
    frame = np.zeros((side + 2, side + 2))
    frame[0], frame[-1] = np.sin(np.pi * t), t * (1 - t)
    frame[:, 0], frame[:, -1] = 0.5 * np.sin(2 * np.pi * t), 0.0

    def area(x: Point) -> Value:
        u = jnp.asarray(frame).at[1:-1, 1:-1].set(x.reshape(side, side))
        p, q = jnp.diff(u, axis=0) * (side + 1), jnp.diff(u, axis=1) * (side + 1)
        lower = 1 + p[:, :-1] ** 2 + q[:-1] ** 2  # the two triangles of each cell
        upper = 1 + p[:, 1:] ** 2 + q[1:] ** 2
        return jnp.sum(jnp.sqrt(lower) + jnp.sqrt(upper)) / (2 * (side + 1) ** 2)

    return area


def ill_conditioned_quadratic(n: int, condition: float) -> Callable[[Point], Value]:
    """x'Ax/2 with eigenvalues log-spaced from 1 to `condition` in random directions."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    matrix = (q * np.logspace(0, np.log10(condition), n)) @ q.T
    return lambda x: x @ (jnp.asarray(matrix) @ x) / 2


def log_sum_exp(n: int, terms: int) -> Callable[[Point], Value]:
    """log sum_i exp(a_i'x - b_i), smooth and convex but nowhere strongly so far away."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((terms, n)), rng.standard_normal(terms)
    return lambda x: jax.nn.logsumexp(jnp.asarray(a) @ x - jnp.asarray(b))


def logistic_regression(features: int, samples: int) -> Callable[[Point], Value]:
    """l2-regularised logistic regression on correlated features of mixed scale."""
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((features, features)) / np.sqrt(features)
    data = rng.standard_normal((samples, features)) @ mixing * np.logspace(-1, 1, features)
    labels = np.where(data @ rng.standard_normal(features) + rng.logistic(size=samples) > 0, 1, -1)
    signed = data * labels[:, None]

    def loss(x: Point) -> Value:
        return jnp.mean(jax.nn.softplus(-(jnp.asarray(signed) @ x))) + 1e-4 * x @ x / 2

    return loss


def _boundary_start(n: int) -> np.ndarray:
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


def functions() -> list[Smooth]:
    """The twenty."""
    ones = np.ones
    return [
        Smooth("rosenbrock", rosenbrock, np.array([-1.2, 1.0])),
        Smooth("beale", beale, ones(2)),
        Smooth("brown_badly_scaled", brown_badly_scaled, ones(2)),
        Smooth("himmelblau", himmelblau, ones(2)),
        Smooth("helical_valley", helical_valley, np.array([-1.0, 0.0, 0.0])),
        Smooth("wood", wood, np.array([-3.0, -1.0, -3.0, -1.0])),
        Smooth("penalty_one", penalty_one, np.arange(1.0, 11.0), 7.087651467090e-5),
        Smooth("dixon_price", dixon_price, ones(10)),
        Smooth("trigonometric", trigonometric, np.full(10, 1 / 10), TRIGONOMETRIC),
        Smooth("variably_dimensioned", variably_dimensioned, 1 - np.arange(1, 31) / 30),
        Smooth("logistic_regression", logistic_regression(50, 400), np.zeros(50), None),
        Smooth("powell_singular", powell_singular, np.tile([3.0, -1.0, 0.0, 1.0], 25)),
        Smooth("discrete_boundary_value", discrete_boundary_value, _boundary_start(10)),
        Smooth("quadratic_1e6", ill_conditioned_quadratic(100, 1e6), ones(100)),
        Smooth("rosenbrock_chain", rosenbrock, np.tile([-1.2, 1.0], 100)),
        Smooth("log_sum_exp", log_sum_exp(200, 600), ones(200), None),
        Smooth("broyden_tridiagonal", broyden_tridiagonal, -ones(500)),
        Smooth("minimal_surface", minimal_surface(26), np.zeros(26**2), None),
        Smooth("engval", engval, np.full(1000, 2.0), None),
        Smooth("nesterov_worst", nesterov_worst, np.zeros(1000), -0.5 * 1000 / 1001),
    ]
