"""A linear equation as a layer: the lanes' solution beside dense least squares.

Advection and diffusion, `u_t + v u_x = nu u_xx` with u = sin(2 pi x) at t = 0, collocated at random
points in the span of 16 random waves: then the layer is a linear least-squares problem.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.inner import Pointwise

SPEED, DIFFUSIVITY, WAVES, INSIDE, INITIAL = 0.5, 0.01, 16, 200, 60


def rows(z: Any, data: Any) -> Any:
    """The equation inside, the initial condition on the line t = 0."""
    u, u_t, u_x, u_xx = z
    initial, target = data
    return jnp.where(initial, u - target, u_t + SPEED * u_x - DIFFUSIVITY * u_xx)


def collocated(seed: int) -> tuple[Any, Any]:
    """Wave numbers in x and t and phases, shape (3, 16); points, shape (2, 260)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    waves = jnp.concatenate(
        [
            4 * jax.random.normal(keys[0], (2, WAVES)),
            jax.random.uniform(keys[1], (1, WAVES), maxval=2 * np.pi),
        ]
    )
    points = jax.random.uniform(keys[2], (2, INSIDE + INITIAL))
    return waves, points.at[1, INSIDE:].set(0.0)


def channels(waves: Any, points: Any) -> Any:
    """u, u_t, u_x, u_xx of every wave at every point."""
    (k, l, phase), (x, t) = waves[:, None], points[:, :, None]  # noqa: E741
    angle = k * x + l * t + phase
    value, slope = jnp.cos(angle), -jnp.sin(angle)
    return jnp.stack([value, l * slope, k * slope, -k * k * value])


def layer(waves: Any, points: Any) -> Any:
    """The coefficients of the solution."""
    data = _data(waves, points)
    one = jax.tree.map(lambda leaf: leaf[None], data)
    start = jnp.zeros((1, WAVES))
    found = tolerax.batched_least_squares(Pointwise(rows), start, one, tolerance=1e-13)
    return found.w[0]


def _data(waves: Any, points: Any) -> Any:
    initial = jnp.arange(points.shape[1]) >= INSIDE
    target = jnp.sin(2 * jnp.pi * points[0])
    return channels(waves, points), (initial.astype(float), target)


def measure(settings: Settings) -> dict[str, Measured]:
    """The largest difference of the solutions at the points, relative to the largest value; and
    that of the derivative of a loss along a direction from central differences of the dense
    solution."""
    errors, slopes = [], []

    def dense(waves: Any, points: Any) -> np.ndarray:
        Phi, (initial, target) = jax.tree.map(np.asarray, _data(waves, points))
        inside = Phi[1] + SPEED * Phi[2] - DIFFUSIVITY * Phi[3]
        matrix = np.where(initial[:, None] > 0, Phi[0], inside)
        return np.linalg.lstsq(matrix, np.where(initial > 0, target, 0.0), rcond=None)[0]

    def loss(u: Any) -> Any:
        return jnp.mean(u**4)

    slope = jax.jit(jax.grad(lambda wa, p: loss(channels(wa, p)[0] @ layer(wa, p))))
    for seed in settings.seeds:
        waves, points = collocated(seed)
        field = lambda wa, w, p=points: np.asarray(channels(wa, p)[0]) @ w  # noqa: E731
        exact = field(waves, dense(waves, points))
        mine = field(waves, np.asarray(layer(waves, points)))
        errors.append(float(np.max(np.abs(mine - exact)) / np.max(np.abs(exact))))
        step = 1e-4 * jnp.cos(jnp.arange(waves.size)).reshape(waves.shape)
        # Richardson: central differences of two lengths, error of fourth order.
        central = []
        for size in (1.0, 0.5):
            ends = [
                loss(field(end, dense(end, points)))
                for end in (waves + size * step, waves - size * step)
            ]
            central.append((ends[0] - ends[1]) / (2 * size))
        true = (4 * central[1] - central[0]) / 3
        slopes.append(float(abs(jnp.vdot(slope(waves, points), step) - true) / abs(true)))
    settings.tell(f"   layer {errors}, gradient {slopes}")
    return {
        "linear_layer": Measured(errors, value=max(errors)),
        "linear_gradient": Measured(slopes, value=max(slopes)),
    }


GROUP = Group(
    "linear",
    (
        Bar("linear_layer", "<=", 1e-10, "linear equation as a layer: error / dense least squares"),
        Bar("linear_gradient", "<=", 1e-6, "its derivative beside finite differences"),
    ),
    measure,
)
