"""Dynamic DFO-LS: a derivative-free method that asks for as much accuracy as its radius needs.

Ehrhardt and Roberts (*Inexact derivative-free optimization for bilevel learning*, J. Math. Imaging
Vis. 63, 2021) minimize sum_i r_i(x)^2, r_i(x) = |y_i(x) - truth_i|, by a model-based trust-region
method and solve the lower level by strongly convex FISTA to an error O(Delta^2), Delta the radius
of the trust region. The DFO-LS package does the outer work as it comes, unchanged: its hook for
the number of samples, called before every evaluation with the radius, tells us Delta.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

Level = Callable[[PyTree, PyTree], Float[Array, ""]]


class Fista(NamedTuple):
    """A lower-level answer: y, |grad h| there, and the gradients that it took."""

    y: PyTree
    residual: Float[Array, ""]
    iterations: Array


@eqx.filter_jit
def fista(
    lower: Level,
    y0: PyTree,
    x: PyTree,
    smoothness: ArrayLike,
    strong_convexity: ArrayLike,
    tolerance: ArrayLike,
    max_iterations: int = 100_000,
) -> Fista:
    """Accelerated gradient steps for a mu-strongly convex, L-smooth function (Chambolle and Pock,
    Acta Numerica 2016, algorithm 5, without a non-smooth part) until |grad h| <= mu tolerance,
    hence |y - y*| <= tolerance. The test uses the gradient that a step needs anyway."""
    start, unravel = ravel_pytree(y0)
    gradient = jax.grad(lambda v: lower(unravel(v), x))
    tau, q = 1 / jnp.asarray(smoothness), jnp.asarray(strong_convexity) / smoothness

    def running(carry):
        _, _, _, g, k = carry
        return (jnp.linalg.norm(g) > strong_convexity * tolerance) & (k < max_iterations)

    def step(carry):
        z, y, t, g, k = carry
        y_new = z - tau * g
        t_new = (1 - q * t**2 + jnp.sqrt((1 - q * t**2) ** 2 + 4 * t**2)) / 2
        momentum = jnp.where(
            q < 1, (t - 1) / t_new * (1 - t_new * q) / jnp.where(q < 1, 1 - q, 1), 0
        )
        z_new = y_new + momentum * (y_new - y)
        return z_new, y_new, t_new, gradient(z_new), k + 1

    g = gradient(start)
    begin = (start, start, jnp.zeros_like(q), g, jnp.array(1))
    z, _, _, g, k = jax.lax.while_loop(running, step, begin)
    return Fista(unravel(z), jnp.linalg.norm(g), k)


class Evaluated(NamedTuple):
    """One evaluation: total lower iterations after it, the point, its lower-level solution."""

    cost: int
    x: np.ndarray
    y: PyTree
    tolerance: float


def dynamic_dfols(
    residuals: Callable[[PyTree], Float[Array, " r"]],
    lower: Level,
    y0: PyTree,
    x0: np.ndarray,
    *,
    smoothness: Callable[[Array], Float[Array, ""]],
    strong_convexity: Callable[[Array], Float[Array, ""]],
    max_evaluations: int,
    accuracy: float = 1.0,
    radius: float = 1.0,
    final_radius: float = 1e-4,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Evaluated]:
    """Every evaluation of a run: the lower error is at most `accuracy` * Delta^2, each solve starts
    from the solution before it, and one FISTA step is one lower iteration."""
    import dfols

    state = {"delta": radius, "cost": 0, "y": y0}
    trace: list[Evaluated] = []

    def on_radius(delta: float, rho: float, iteration: int, runs: int) -> int:
        del rho, iteration, runs
        state["delta"] = delta
        return 1

    def objective(point: np.ndarray) -> np.ndarray:
        x, tolerance = jnp.asarray(point), accuracy * state["delta"] ** 2
        answer = fista(lower, state["y"], x, smoothness(x), strong_convexity(x), tolerance)
        state["cost"] += int(answer.iterations)
        state["y"] = answer.y
        trace.append(Evaluated(state["cost"], np.array(point), answer.y, tolerance))
        return np.asarray(residuals(answer.y))

    dfols.solve(
        objective,
        np.asarray(x0, float),
        bounds=bounds,
        rhobeg=radius,
        rhoend=final_radius,
        maxfun=max_evaluations,
        nsamples=on_radius,
        do_logging=False,
    )
    return trace
