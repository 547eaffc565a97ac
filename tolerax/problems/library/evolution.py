"""P3 and P5: control of evolving states, whose discrete optima are known.

Costs carry the area of a cell and the length of a step, states are measured in L2, controls in L2
of space or of time and space: no tolerance or iteration count depends on grid or steps.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tolerax.inner.direct import Direct
from tolerax.inner.spectral import Laplacian
from tolerax.problems.implicit_euler import ImplicitEuler
from tolerax.problems.library.base import check_count, check_real
from tolerax.problems.time_dependent import TimeDependent

Grid = Float[Array, "n n"]
Line = Float[Array, " n"]


class EvolutionExample(eqx.Module):
    """A ready-made time-dependent problem whose discrete optimum is known.

    - `problem`: the [`TimeDependent`][] to solve; `x0`: where its benchmark starts.
    - `optimum`: the x at which the gradient vanishes; `state`: the state after the last step there.
    - `gradient`: callable x -> the exact gradient, where there is a formula for it, or `None`.
    - `laplacian`: A. `description`: equation, data and sizes in a line.
    """

    problem: TimeDependent
    x0: Array
    optimum: Array
    state: Array
    gradient: Callable | None
    laplacian: Laplacian
    description: str = eqx.field(static=True)

    def distance(self, x: Array) -> Float[Array, ""]:
        """How far a control is from the optimum, in the norm of L2."""
        return jnp.sqrt(jnp.mean((x - self.optimum) ** 2))


class Diffusing(eqx.Module):
    """`dt -> (r -> (I + dt kappa A)^-1 r)`: a step of the heat equation is one solve."""

    laplacian: Laplacian
    kappa: Array

    def __call__(self, dt: Array) -> Callable[[Array], Array]:
        rate = dt * self.kappa
        return lambda r: self.laplacian.solve(r, 1 / rate) / rate


class Heat(eqx.Module):
    """`-kappa A y`."""

    laplacian: Laplacian
    kappa: Array

    def __call__(self, t: Any, y: Grid, u: Any) -> Grid:
        return -self.kappa * self.laplacian.mv(y)


class Arrival(eqx.Module):
    """`|y - y_d|^2 / 2 + alpha |x|^2 / 2` in L2, for the last state y and the first state x."""

    target: Grid
    alpha: Array
    area: float = eqx.field(static=True)

    def __call__(self, y: Grid, x: Grid) -> Float[Array, ""]:
        return 0.5 * self.area * (jnp.sum((y - self.target) ** 2) + self.alpha * jnp.sum(x**2))


class HeatGradient(eqx.Module):
    """`h^2 (S (S x - y_d) + alpha x)`, with `S = (I + dt kappa A)^-steps` by a sine transform."""

    laplacian: Laplacian
    target: Grid
    alpha: Array
    rate: Array
    steps: int = eqx.field(static=True)

    def __call__(self, x: Grid) -> Grid:
        damp = lambda v: (1 + self.rate * v) ** -self.steps  # noqa: E731
        misfit = self.laplacian.function(damp, x) - self.target
        slope = self.laplacian.function(damp, misfit) + self.alpha * x
        return self.laplacian.spacing[0] ** 2 * slope


def _first(x: Array) -> Array:
    return x


def heat_initial_condition(
    n: int = 64,
    steps: int = 50,
    alpha: float = 1e-3,
    *,
    kappa: float = 0.005,
    **options: Any,
) -> EvolutionExample:
    """P3: which temperature x at time 0 becomes y_d at time 1? `|y(1) - y_d|^2 / 2 + alpha
    |x|^2 / 2` with `dy/dt = -kappa A y` and `y(0) = x`, on n x n interior points of the square.

    y_d is as in [`poisson_control`][]. Every mode is its own problem, with the factor
    `S = (1 + kappa mu / steps)^-steps` from time 0 to 1: hence the optimum `S y_d / (S^2 + alpha)`
    and a formula for the gradient, exact for the discrete problem. Steps are solved by a fast sine
    transform. `options` are passed on to [`ImplicitEuler`][].

    >>> from tolerax.problems.library import heat_initial_condition
    >>> p = heat_initial_condition(n=7, steps=10)
    >>> p.gradient(p.x0).shape, p.description
    ((7, 7), 'Heat, initial condition: 7 x 7 points, 10 steps, alpha 0.001.')
    """
    n, steps = check_count("n", n, 3), check_count("steps", steps, 1)
    weight = jnp.asarray(check_real("alpha", alpha, 1e-12))
    rate = jnp.asarray(check_real("kappa", kappa, 1e-12))
    laplacian = Laplacian((n, n))
    h = laplacian.spacing[0]
    points = jnp.linspace(h, 1 - h, n)
    s, t = jnp.meshgrid(points, points, indexing="ij")
    box = (jnp.abs(s - 0.5) <= 0.25) & (jnp.abs(t - 0.5) <= 0.25)
    target = box + 0.2 * jnp.exp(s) * t
    damp = lambda v: (1 + rate * v / steps) ** -steps  # noqa: E731
    optimum = laplacian.function(lambda v: damp(v) / (damp(v) ** 2 + weight), target)
    method: dict[str, Any] = {
        "preconditioner": Diffusing(laplacian, rate),
        "linear_solver": Direct(),
    } | options
    return EvolutionExample(
        problem=TimeDependent(
            Heat(laplacian, rate),
            Arrival(target, weight, h**2),
            _first,
            method=ImplicitEuler(steps, **method),
            weight=h**2,
            metric=h**2,
        ),
        x0=jnp.zeros((n, n)),
        optimum=optimum,
        state=laplacian.function(damp, optimum),
        gradient=HeatGradient(laplacian, target, weight, rate / steps, steps),
        laplacian=laplacian,
        description=f"Heat, initial condition: {n} x {n} points, {steps} steps, alpha {alpha:g}.",
    )


class Burgers(eqx.Module):
    """`-(y^2 / 2)_s - nu A y + u + source`, by central differences."""

    laplacian: Laplacian
    nu: Array

    def __call__(self, t: Any, y: Line, u: tuple[Line, Line, Line]) -> Line:
        flux = jnp.pad(0.5 * y**2, 1)
        convection = (flux[2:] - flux[:-2]) / (2 * self.laplacian.spacing[0])
        return u[0] + u[1] - convection - self.nu * self.laplacian.mv(y)


class Following(eqx.Module):
    """`|y - target|^2 / 2 + alpha |u|^2 / 2` in L2 at one time."""

    alpha: Array
    spacing: float = eqx.field(static=True)

    def __call__(self, t: Any, y: Line, u: tuple[Line, Line, Line]) -> Float[Array, ""]:
        control, _, target = u
        misfit = jnp.sum((y - target) ** 2) + self.alpha * jnp.sum(control**2)
        return 0.5 * self.spacing * misfit


class WithData(eqx.Module):
    """A control together with the sources and targets of its steps."""

    source: Float[Array, "steps n"]
    target: Float[Array, "steps n"]

    def __call__(self, x: Float[Array, "steps n"]) -> tuple[Array, Array, Array]:
        return x, self.source, self.target


def burgers_control(
    n: int = 128,
    steps: int = 100,
    alpha: float = 1e-3,
    *,
    nu: float = 0.01,
    **options: Any,
) -> EvolutionExample:
    """P5: Burgers' equation `dy/dt + (y^2 / 2)_s = nu y_ss + u + source` on the unit interval for a
    unit of time, with a control u in time and space that makes y follow a target:
    `|y - y_d|^2 / 2 + alpha |u|^2 / 2` in L2 of both.

    Source and target are made such that a given trajectory and control satisfy the discrete
    optimality system to rounding: a front forms, moves, and is held back. x has the shape
    (steps, n). `options` are passed on to [`ImplicitEuler`][].

    >>> from tolerax.problems.library import burgers_control
    >>> p = burgers_control(n=15, steps=10)
    >>> p.x0.shape, p.description
    ((10, 15), 'Burgers control: 15 points, 10 steps, nu 0.01, alpha 0.001.')
    """
    n, steps = check_count("n", n, 3), check_count("steps", steps, 1)
    weight = jnp.asarray(check_real("alpha", alpha, 1e-12))
    viscosity = jnp.asarray(check_real("nu", nu, 1e-12))
    laplacian = Laplacian((n,))
    h, dt = laplacian.spacing[0], 1 / steps
    s = np.linspace(h, 1 - h, n)[None]
    t = np.linspace(0, 1, steps + 1)[:, None]
    # A front that moves to the right, and vanishes at both ends of the interval.
    front = 1 / (1 + np.exp((s - 0.4 - 0.3 * t) / 0.05))
    states = np.sin(np.pi * s) * (0.3 + 0.7 * front)
    optimum = min(1.0, 2e-3 / alpha) * (1 - t[:-1]) * np.sin(np.pi * s)
    optimum = optimum * np.cos(2 * np.pi * (s - t[:-1]))
    field, zero = Burgers(laplacian, viscosity), jnp.zeros(n)

    def both(y: Line, u: Line, q: Line) -> tuple[Line, Line]:
        """The vector field without its source, and the transpose of its derivative times q."""
        value, pull = jax.vjp(lambda y: field(0.0, y, (u, zero, zero)), y)
        return value, pull(q)[0]

    before, after = states[:-1], states[1:]
    # u = -q / alpha at the optimum, and the adjoint equation gives the target.
    q = -alpha * optimum
    still, pulled = jax.jit(jax.vmap(both))(after, optimum, q)
    source = (after - before) / dt - still
    later = np.concatenate([q[1:], np.zeros((1, n))])
    target = after - (q - later) / dt + pulled
    method: dict[str, Any] = {"preconditioner": Diffusing(laplacian, viscosity)} | options
    return EvolutionExample(
        problem=TimeDependent(
            field,
            None,
            jnp.asarray(states[0]),
            running_cost=Following(weight, h),
            controls=WithData(source, jnp.asarray(target)),
            method=ImplicitEuler(steps, **method),
            weight=h,
            metric=h * dt,
        ),
        x0=jnp.zeros((steps, n)),
        optimum=jnp.asarray(optimum),
        state=jnp.asarray(states[-1]),
        gradient=None,
        laplacian=laplacian,
        description=f"Burgers control: {n} points, {steps} steps, nu {nu:g}, alpha {alpha:g}.",
    )
