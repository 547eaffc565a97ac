"""P1, P2 and P4: elliptic control problems on the unit square whose optima are known.

A is minus the Laplacian by second differences on n x n interior points of spacing h, with zero
boundary values. Costs and residuals carry the area h^2 of a cell, states are measured in the norm
of h^2 A, controls in that of h^2 or of their regularization: no tolerance, constant or iteration
count depends on n.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tolerax.inner.direct import Direct
from tolerax.inner.metric import Metric
from tolerax.inner.multigrid import Diffusion
from tolerax.inner.spectral import Laplacian
from tolerax.problems.constants import proved
from tolerax.problems.library.base import check_count, check_real
from tolerax.problems.norms import CrossBounds
from tolerax.problems.pde import PDEConstrained

Grid = Float[Array, "n n"]


class PDEExample(eqx.Module):
    """A ready-made PDE-constrained problem whose discrete optimum is known.

    - `problem`: the [`PDEConstrained`][] to solve; `x0`: where its benchmark starts.
    - `optimum`, `state`: the control at which the gradient vanishes and its state.
    - `residual(y, u)`, `cost(y, u)`: what `problem` was made of; `laplacian`: A.
    - `description`: equation, data and the origin of the constants, in a few lines.
    """

    problem: PDEConstrained
    x0: Float[Array, "N N"]
    optimum: Float[Array, "N N"]
    state: Grid
    residual: Callable
    cost: Callable
    laplacian: Laplacian
    description: str = eqx.field(static=True)

    def distance(self, u: Float[Array, "N N"]) -> Float[Array, ""]:
        """How far a control is from the optimum, in the norm of L2."""
        return jnp.sqrt(jnp.mean((u - self.optimum) ** 2))


class RieszMap(eqx.Module):
    """`r -> (h^2 A)^-1 r`, the same at every control."""

    laplacian: Laplacian

    def __call__(self, u: Any) -> Callable[[Grid], Grid]:
        del u
        return lambda r: self.laplacian.solve(r) / self.laplacian.spacing[0] ** 2


class Equation(eqx.Module):
    """`h^2 (A y + f(y) - u - s)` with f nothing, the cube, or `-lam exp(y)`."""

    laplacian: Laplacian
    source: Grid
    kind: str = eqx.field(static=True)
    lam: float | Array = 0.0

    def __call__(self, y: Grid, u: Grid) -> Grid:
        return self.laplacian.spacing[0] ** 2 * (self.steady(y) - u - self.source)

    def steady(self, y: Grid) -> Grid:
        """A y + f(y)."""
        term = {"linear": lambda y: 0 * y, "cubic": lambda y: y**3}
        term["bratu"] = lambda y: -self.lam * jnp.exp(y)
        return self.laplacian.mv(y) + term[self.kind](y)


class Tracking(eqx.Module):
    """`|y - y_d|^2 / 2 + alpha |u|^2 / 2` in L2."""

    target: Grid
    alpha: float | Array
    spacing: float = eqx.field(static=True)

    def __call__(self, y: Grid, u: Grid) -> Float[Array, ""]:
        misfit = jnp.sum((y - self.target) ** 2) + self.alpha * jnp.sum(u**2)
        return 0.5 * self.spacing**2 * misfit


def _grid(n: int) -> tuple[Laplacian, float, Grid, Grid]:
    laplacian = Laplacian((n, n))
    h = laplacian.spacing[0]
    points = jnp.linspace(h, 1 - h, n)
    s, t = jnp.meshgrid(points, points, indexing="ij")
    return laplacian, h, s, t


def _constants(laplacian: Laplacian) -> dict[str, Any]:
    """The constants that hold for `h^2 (A y + monotone - u)` in the norm of `h^2 A`, with the L2
    norm on controls: |e|_L2^2 <= |e|_R^2 / lam."""
    lam = jnp.min(laplacian.eigenvalues)
    return {
        "stability": proved(1.0, because="F_y is at least R"),
        "smoothness": proved(1 / lam, because="J_yy is the mass matrix"),
        "cross": proved(
            ConstantCross(lam**-0.5), because="F_u is minus the mass matrix, whatever y is"
        ),
        "monotone": True,
        "riesz": RieszMap(laplacian),
        "metric": laplacian.spacing[0] ** 2,
        "symmetric": True,
    }


class ConstantCross(eqx.Module):
    """Bounds for a cross derivative that depends on nothing."""

    adjoint: Float[Array, ""]

    def __call__(self, y: Any, q: Any, u: Any) -> CrossBounds:
        del y, q, u
        zero = jnp.zeros_like(self.adjoint)
        return CrossBounds(adjoint=self.adjoint, state=zero, both=zero)


def poisson_control(n: int = 64, alpha: float = 1e-4, **options: Any) -> PDEExample:
    """P1: `|y - y_d|^2 / 2 + alpha |u|^2 / 2` with `A y = u`.

    y_d is the indicator of the centred box of half the width, plus `0.2 exp(x) y`: many modes, so
    that no method is done after a few steps. Every mode is its own problem, hence the optimum
    `A y_d / (alpha A^2 + 1)`. The state solve is a fast sine transform. `options` are passed on to
    [`PDEConstrained`][].

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.problems.library import poisson_control
    >>> p = poisson_control(n=15)
    >>> query = tolerax.Query(p.optimum, tolerax.Accuracy(1e-12, 1e-12))
    >>> bool(jnp.linalg.norm(p.problem.evaluate(query).gradient) < 1e-12)
    True
    """
    n, weight = check_count("n", n, 3), jnp.asarray(check_real("alpha", alpha, 1e-12))
    laplacian, h, s, t = _grid(n)
    box = (jnp.abs(s - 0.5) <= 0.25) & (jnp.abs(t - 0.5) <= 0.25)
    target = box + 0.2 * jnp.exp(s) * t
    optimum = laplacian.function(lambda v: v / (weight * v**2 + 1), target)
    zero = jnp.zeros((n, n))
    residual, cost = Equation(laplacian, zero, "linear"), Tracking(target, weight, h)
    floor = h**2 * float(jnp.min(laplacian.eigenvalues))
    constants = _constants(laplacian) | {
        "curvature": proved(0.0, because="the equation is linear"),
        "linear_solver": Direct(floor=floor),
    }
    return PDEExample(
        problem=PDEConstrained(residual, cost, zero, **(constants | options)),
        x0=zero,
        optimum=optimum,
        state=laplacian.solve(optimum),
        residual=residual,
        cost=cost,
        laplacian=laplacian,
        description=(f"Poisson control, {n} x {n} points, alpha {alpha:g}. All constants proved."),
    )


class Bend(eqx.Module):
    """How fast the derivative of `y^3` can change along the way to the state of a control u.

    The maximum principle bounds the state by the smaller of `|u + s|^(1/3)` and an eighth of
    `|u + s|`; with `|e|_4^4 <= |e|_2^2 |e|_R^2 / 2` (Ladyzhenskaya, also for differences),
    `3 <(2y + e) e w, v>` is at most `6 Y |e|_4 |w|_4 |v|_2 <= 6 Y / (sqrt(2) lam) |e| |w| |v|`
    where both y and y + e are at most Y; twice the bound of the state leaves room for y + e.
    """

    source: Grid
    lam: Float[Array, ""]

    def __call__(self, u: Grid) -> Float[Array, ""]:
        size = jnp.max(jnp.abs(u + self.source))
        most = 2 * jnp.minimum(jnp.cbrt(size), size / 8)
        return 6 * most / (jnp.sqrt(2.0) * self.lam)


def semilinear_control(
    n: int = 64, alpha: float = 1e-4, *, bratu: float | None = None, **options: Any
) -> PDEExample:
    """P4: `|y - y_d|^2 / 2 + alpha |u|^2 / 2` with `A y + y^3 = u + s`.

    s and y_d are made such that a given pair of state and control satisfies the optimality system
    to rounding. With `bratu` the cube is replaced by `-bratu exp(y)`: beyond a turning point (6.808
    for u = 0) there is no state, and the constants of the bounds are estimated. `options` are
    passed on to [`PDEConstrained`][].

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.problems.library import semilinear_control
    >>> p = semilinear_control(n=15)
    >>> query = tolerax.Query(p.optimum, tolerax.Accuracy(1e-10, 1e-12))
    >>> bool(jnp.linalg.norm(p.problem.evaluate(query).gradient) < 1e-9)
    True
    """
    n, weight = check_count("n", n, 3), jnp.asarray(check_real("alpha", alpha, 1e-12))
    laplacian, h, s, t = _grid(n)
    bubble = 16 * s * (1 - s) * t * (1 - t)
    state = 0.5 * jnp.sin(jnp.pi * s) * jnp.sin(jnp.pi * t) + 0.5 * bubble * jnp.sin(4 * s * t)
    # An adjoint -alpha u that is small enough keeps the Hessian positive definite there.
    size = jnp.minimum(20.0, 0.05 / weight)
    optimum = size * bubble * (jnp.exp(s) * (t - 0.4) + 0.3 * jnp.sin(2 * jnp.pi * (s + 2 * t)))
    zero = jnp.zeros((n, n))
    if bratu is None:
        equation = Equation(laplacian, zero, "cubic")
    else:
        equation = Equation(laplacian, zero, "bratu", jnp.asarray(check_real("bratu", bratu, 0.0)))
    pull, adjoint = jax.vjp(equation.steady, state)[1], -weight * optimum
    residual = eqx.tree_at(lambda e: e.source, equation, equation.steady(state) - optimum)
    cost = Tracking(state - pull(adjoint)[0], weight, h)
    constants = _constants(laplacian)
    if bratu is None:
        constants["curvature"] = Bend(residual.source, jnp.min(laplacian.eigenvalues))
    else:
        constants |= {"stability": None, "curvature": None, "monotone": False}
    kind = "y^3" if bratu is None else f"-{bratu:g} exp(y)"
    return PDEExample(
        problem=PDEConstrained(residual, cost, zero, **(constants | options)),
        x0=zero,
        optimum=optimum,
        state=state,
        residual=residual,
        cost=cost,
        laplacian=laplacian,
        description=f"Semilinear control with {kind}, {n} x {n} points, alpha {alpha:g}.",
    )


class Conduction(eqx.Module):
    """`h^2 (-div(exp(m) grad y) - f)`; m lives on all points, those of the boundary included."""

    source: Grid
    spacing: float = eqx.field(static=True)

    def __call__(self, y: Grid, m: Float[Array, "N N"]) -> Grid:
        return self.spacing**2 * (Diffusion.of(jnp.exp(m)).mv(y) - self.source)


class Inversion(eqx.Module):
    """`|y - d|^2 / (2 sigma^2)` in L2, plus `m'Rm / 2 - <g, m>` with R the metric of m."""

    data: Grid
    linear: Float[Array, "N N"]
    regularizer: Metric
    variance: Array
    spacing: float = eqx.field(static=True)

    def __call__(self, y: Grid, m: Float[Array, "N N"]) -> Float[Array, ""]:
        misfit = 0.5 * self.spacing**2 * jnp.sum((y - self.data) ** 2) / self.variance
        return misfit + 0.5 * jnp.vdot(m, self.regularizer.mv(m)) - jnp.vdot(self.linear, m)


class Smoothness(eqx.Module):
    """`h^2 (gamma A + delta)` with zero flux, on the points of the boundary too; or its inverse."""

    laplacian: Laplacian
    gamma: Array
    delta: Array
    inverse: bool = eqx.field(static=True)

    def __call__(self, m: Float[Array, "N N"]) -> Float[Array, "N N"]:
        area = self.laplacian.spacing[0] ** 2
        if self.inverse:
            return self.laplacian.solve(m, self.delta / self.gamma) / (self.gamma * area)
        return area * (self.gamma * self.laplacian.mv(m) + self.delta * m)


class LeastConduction(eqx.Module):
    """`A(m) >= exp(min m) A`: the harmonic mean of two points is at least the smaller one."""

    def __call__(self, m: Float[Array, "N N"]) -> Float[Array, ""]:
        return jnp.exp(jnp.min(m))


def coefficient_inversion(
    n: int = 32,
    gamma: float = 1e-2,
    delta: float = 1e-2,
    sigma: float = 0.03,
    **options: Any,
) -> PDEExample:
    """P2: find the logarithm m of a coefficient from the state of `-div(exp(m) grad y) = f`.

    The cost is `|y - d|^2 / (2 sigma^2) + gamma |grad m|^2 / 2 + delta |m|^2 / 2 - <g, m>`. Source,
    data d and g are made such that a given pair of state and coefficient satisfies the optimality
    system to rounding, with an adjoint that is not 0. The regularization is the metric on m.
    `options` are passed on to [`PDEConstrained`][]; `optimum` and `x0` have n + 2 points an axis.

    >>> import jax.numpy as jnp, tolerax
    >>> from tolerax.problems.library import coefficient_inversion
    >>> p = coefficient_inversion(n=15)
    >>> query = tolerax.Query(p.optimum, tolerax.Accuracy(1e-10, 1e-10))
    >>> bool(jnp.linalg.norm(p.problem.evaluate(query).gradient) < 1e-8)
    True
    """
    n = check_count("n", n, 3)
    given = {"gamma": gamma, "delta": delta, "sigma": sigma}
    g, d, s2 = (jnp.asarray(check_real(name, value, 1e-12)) for name, value in given.items())
    s2 = s2**2
    laplacian, h, s, t = _grid(n)
    bubble = 16 * s * (1 - s) * t * (1 - t)
    state = bubble * (1 + 0.5 * jnp.sin(3 * s - 2 * t))
    all_points = jnp.linspace(0, 1, n + 2)
    a, b = jnp.meshgrid(all_points, all_points, indexing="ij")
    optimum = 0.7 * jnp.sin(2 * jnp.pi * a) * jnp.cos(jnp.pi * b) + 0.5 * jnp.exp(
        -20 * ((a - 0.6) ** 2 + (b - 0.4) ** 2)
    )
    around = Laplacian((n + 2, n + 2), spacing=h, boundary="neumann")
    metric = Metric(Smoothness(around, g, d, False), Smoothness(around, g, d, True))
    exact = Diffusion.of(jnp.exp(optimum))
    residual = Conduction(exact.mv(state), h)
    adjoint = 0.02 * bubble * jnp.cos(2 * s + t)
    data = state - s2 * exact.mv(adjoint)
    slope = jax.vjp(lambda m: residual(state, m), optimum)[1](adjoint)[0]
    cost = Inversion(data, metric.mv(optimum) - slope, metric, s2, h)
    lam = float(jnp.min(laplacian.eigenvalues))
    constants = {
        "stability": proved(LeastConduction(), because="coefficients are means of exp(m)"),
        "curvature": proved(0.0, because="the equation is linear in y"),
        "smoothness": proved(1 / (lam * s2), because="J_yy is a multiple of the mass matrix"),
        "monotone": True,
        "riesz": RieszMap(laplacian),
        "metric": metric,
        "symmetric": True,
    }
    zero = jnp.zeros((n, n))
    return PDEExample(
        problem=PDEConstrained(residual, cost, zero, **(constants | options)),
        x0=jnp.zeros((n + 2, n + 2)),
        optimum=optimum,
        state=state,
        residual=residual,
        cost=cost,
        laplacian=laplacian,
        description=(
            f"Coefficient inversion, {n} x {n} points, contrast "
            f"{float(np.exp(jnp.max(optimum) - jnp.min(optimum))):.0f}."
        ),
    )
