"""SOBA and SABA with a tuned grid (Dagréou, Ablin, Vaiter and Moreau, NeurIPS 2022).

With v the running adjoint, all on one minibatch of the lower and one of the upper level,

    y <- y - rho grad_y g(y, x)
    v <- v - rho (grad_yy g(y, x) v + grad_y f(y, x))
    x <- x - gamma (grad_x f(y, x) + grad_xy g(y, x) v),     gamma = rho / ratio

SOBA takes the minibatch terms as they come, SABA replaces each by the SAGA estimate over the
minibatches of a fixed partition (memory starting at zero). Constant steps, minibatches of 64 in a
new order every epoch, a grid of 5 x 5 values of (rho, ratio): the set-up of the authors' public
benchmark.

Cost convention: a step on a minibatch of b out of n lower-level samples is charged b/n lower
gradients and b/n Hessian products. Products with the cross derivative and everything about the
upper level are free, here as for every other method. Estimating the L that scales the grid is free.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

Vector = Float[Array, " m"]


class Level(eqx.Module):
    """One level as a sum over samples: rest(y, x) + scale * sum_i terms(y, x, indices)_i."""

    terms: Callable[[PyTree, PyTree, Int[Array, " k"]], Float[Array, " k"]]
    rest: Callable[[PyTree, PyTree], Float[Array, ""]]
    samples: int
    scale: float

    def full(self, y: PyTree, x: PyTree) -> Float[Array, ""]:
        """The level on all its samples."""
        terms = self.terms(y, x, jnp.arange(self.samples))
        return self.rest(y, x) + self.scale * jnp.sum(terms)


class Batches(NamedTuple):
    """A fixed partition into minibatches; the last one is padded with weight 0. A batch's estimate
    is unbiased when all batches are equally likely."""

    indices: Int[Array, "blocks size"]
    weights: Float[Array, "blocks size"]

    @staticmethod
    def of(samples: int, size: int, key: Array) -> "Batches":
        blocks = -(-samples // size)
        order = jax.random.permutation(key, samples)
        padded = jnp.pad(order, (0, blocks * size - samples)).reshape(blocks, size)
        inside = jnp.arange(blocks * size).reshape(blocks, size) < samples
        return Batches(padded, jnp.where(inside, float(blocks), 0.0))

    @property
    def blocks(self) -> int:
        return self.indices.shape[0]


def estimate(level: Level, batches: Batches, block: Array, y: PyTree, x: PyTree) -> Array:
    """The level as its minibatch `block` sees it."""
    terms = level.terms(y, x, batches.indices[block])
    return level.rest(y, x) + level.scale * jnp.sum(batches.weights[block] * terms)


def steps_for(cost: float, lower_batches: Batches) -> int:
    """How many steps a cost in full passes (lower gradients + Hessian products) pays for."""
    return int(cost * lower_batches.blocks / 2)


def saga(term: Vector, memory: tuple[Array, Array], block: Array) -> tuple[Vector, Any]:
    """The SAGA estimate from a new minibatch term, and the memory (table, its mean) after it."""
    table, mean = memory
    change = term - table[block]
    return change + mean, (table.at[block].set(term), mean + change / table.shape[0])


class Outcome(NamedTuple):
    """Where a run ended; not finite where it diverged."""

    x: PyTree
    y: PyTree


@partial(eqx.filter_jit, donate="none")
def run(
    upper: Level,
    lower: Level,
    y0: PyTree,
    x0: PyTree,
    rho: Float[Array, ""],
    ratio: Float[Array, ""],
    key: Array,
    *,
    steps: int,
    variance_reduced: bool,
    size: int = 64,
    bounds: tuple[float, float] | None = None,
) -> Outcome:
    """One run of SOBA, or of SABA when `variance_reduced`."""
    y, to_y = ravel_pytree(y0)
    x, to_x = ravel_pytree(x0)
    partition, order = jax.random.split(key)
    lower_batches = Batches.of(lower.samples, size, partition)
    upper_batches = Batches.of(upper.samples, size, jax.random.fold_in(partition, 1))

    def block_at(batches: Batches, k: Array, stream: int) -> Array:
        epoch, position = k // batches.blocks, k % batches.blocks
        shuffle = jax.random.fold_in(jax.random.fold_in(order, stream), epoch)
        return jax.random.permutation(shuffle, batches.blocks)[position]

    def step(carry, k):
        x, y, v, memory = carry
        i, j = block_at(lower_batches, k, 0), block_at(upper_batches, k, 1)
        g = lambda y, x: estimate(lower, lower_batches, i, to_y(y), to_x(x))  # noqa: E731
        f = lambda y, x: estimate(upper, upper_batches, j, to_y(y), to_x(x))  # noqa: E731
        g_y, pull = jax.vjp(jax.grad(g), y, x)
        g_yy_v, g_xy_v = pull(v)
        f_y, f_x = jax.grad(f, (0, 1))(y, x)
        terms = {"g_y": (g_y, i), "g_yy_v": (g_yy_v, i), "g_xy_v": (g_xy_v, i)}
        terms |= {"f_y": (f_y, j), "f_x": (f_x, j)}
        d = {}
        for name, (term, block) in terms.items():
            d[name] = term
            if variance_reduced:
                d[name], memory[name] = saga(term, memory[name], block)
        y = y - rho * d["g_y"]
        v = v - rho * (d["g_yy_v"] + d["f_y"])
        x = x - rho / ratio * (d["f_x"] + d["g_xy_v"])
        if bounds is not None:
            x = jnp.clip(x, *bounds)
        return (x, y, v, memory), None

    def empty(batches: Batches, like: Vector) -> tuple[Array, Array]:
        return jnp.zeros((batches.blocks, *like.shape), like.dtype), jnp.zeros_like(like)

    memory = {}
    if variance_reduced:
        memory = {"g_y": empty(lower_batches, y), "g_yy_v": empty(lower_batches, y)}
        memory |= {"g_xy_v": empty(lower_batches, x)}
        memory |= {"f_y": empty(upper_batches, y), "f_x": empty(upper_batches, x)}
    start = (x, y, jnp.zeros_like(y), memory)
    (x, y, _, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return Outcome(to_x(x), to_y(y))


def largest_curvature(lower: Level, y: PyTree, x: PyTree, iterations: int = 50) -> float:
    """lambda_max of the lower-level Hessian at (y, x) by power iteration."""
    flat, unravel = ravel_pytree(y)
    gradient = jax.grad(lambda v: lower.full(unravel(v), x))
    product = jax.jit(jax.linearize(gradient, flat)[1])
    u = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    for _ in range(iterations):
        u = product(u / jnp.linalg.norm(u))
    return float(jnp.linalg.norm(u))


class Tuned(NamedTuple):
    """The best of a grid: its loss, its parameters, and all losses (`inf` where diverged)."""

    loss: float
    best: tuple[str, float, float]
    losses: dict[str, list[list[float]]]


def grid(
    upper: Level,
    lower: Level,
    y0: PyTree,
    x0: PyTree,
    true_loss: Callable[[PyTree, PyTree], float],
    *,
    cost: float,
    seed: int,
    ratios: Sequence[float],
    steps: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0),
    methods: Sequence[str] = ("SOBA", "SABA"),
    bounds: tuple[float, float] | None = None,
) -> Tuned:
    """Every method on every (step, ratio) to the same cost; the best is chosen by the true upper
    loss at the end, whose lower-level solves are free. Steps are in units of 1/L at the start."""
    key = jax.random.key(seed)
    count = steps_for(cost, Batches.of(lower.samples, 64, key))
    rhos = np.asarray(steps) / largest_curvature(lower, y0, x0)
    losses, best = {}, (np.inf, ("", np.nan, np.nan))
    for method in methods:
        losses[method] = []
        for step, rho in zip(steps, rhos, strict=True):

            def one(ratio: Array, rho: float = rho, method: str = method) -> Outcome:
                return run(
                    upper, lower, y0, x0, jnp.asarray(rho), ratio, key, steps=count,
                    variance_reduced=method == "SABA", bounds=bounds,
                )  # fmt: skip

            outcomes = jax.vmap(one)(jnp.asarray(ratios))
            row = []
            for column, ratio in enumerate(ratios):
                x, y = jax.tree.map(lambda leaf, c=column: leaf[c], tuple(outcomes))
                finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((x, y)))
                loss = true_loss(x, y) if finite else np.inf
                row.append(loss)
                if loss < best[0]:
                    best = (loss, (method, step, ratio))
            losses[method].append(row)
    return Tuned(best[0], best[1], losses)
