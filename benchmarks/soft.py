"""Peers of layers: the equation as a penalty, and what projects its answer afterwards."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from tolerax.problems import Equation


def optimizer(rate: float, count: int) -> Any:
    """What all networks are trained with."""
    import optax

    schedule = optax.cosine_decay_schedule(rate, count)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def relative(u: Any, reference: np.ndarray) -> np.ndarray:
    """The error of each field."""
    gap = np.linalg.norm((np.asarray(u) - reference).reshape(len(reference), -1), axis=1)
    return gap / np.linalg.norm(reference.reshape(len(reference), -1), axis=1)


def summary(done: Any, u: Any, jump: Any, reference: np.ndarray, seconds: float) -> dict[str, Any]:
    """The errors of a trained layer's fields, and what its training took."""
    return {
        "error": float(np.mean(relative(u, reference))),
        "worst": float(np.max(relative(u, reference))),
        "jump": float(jnp.mean(jump)),
        "evaluations": int(done.state.evaluations.sum()),
        "failed": int(done.state.failed.sum()),
        "seconds": round(seconds, 1),
    }


def field(equation: Equation, network: Callable, inputs: Any) -> Any:
    """The lift and the mean of the outputs of the network."""
    lift = 0 if equation.lift is None else equation.lift(inputs)
    return lift + jnp.mean(network(inputs), axis=0)


def residual(equation: Equation, u: Any, inputs: Any) -> Any:
    """The equation's at every point of a field."""
    data = None if equation.data is None else equation.data(inputs)
    return equation.residual(equation.channels(u), data)


def trained_soft(
    equation: Equation, network: Any, inputs: Any, rule: Any, count: int, batch: int
) -> tuple[Any, float]:
    """A network after `count` steps on the mean squared residual of its [`field`][], and seconds.
    What holds by the ansatz of a layer, at the beginning and at the inlet, holds here too."""
    import optax

    weights, static = eqx.partition(network, eqx.is_inexact_array)
    samples = len(jax.tree.leaves(inputs)[0])

    @jax.jit
    def step(weights: Any, state: Any, key: Any) -> Any:
        own = jax.random.randint(key, (batch,), 0, samples)
        some = jax.tree.map(lambda leaf: leaf[own], inputs)

        def loss(weights: Any) -> Any:
            now = eqx.combine(weights, static)
            one = lambda given: residual(equation, field(equation, now, given), given)  # noqa: E731
            return jnp.mean(jax.vmap(one)(some) ** 2)

        move, state = rule.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, move), state

    state, began = rule.init(weights), time.perf_counter()
    for t in range(count):
        weights, state = step(weights, state, jax.random.key(t))
    jax.block_until_ready(weights)
    return eqx.combine(weights, static), time.perf_counter() - began


def fields(equation: Equation, network: Any, inputs: Any) -> Any:
    """Of all inputs."""
    one = lambda network, given: field(equation, network, given)  # noqa: E731
    return eqx.filter_jit(eqx.filter_vmap(one, in_axes=(None, 0)))(network, inputs)


def newton_step(equation: Equation, u: Any, inputs: Any, free: np.ndarray) -> Any:
    """The field after one step of Gauss and Newton on the residual at every point, in the values
    where `free` holds: the least change that makes the linearized equation hold best. Nothing is
    trained, and the work is that of one dense solve with all points of the grid."""
    where = np.flatnonzero(free)

    @jax.jit
    def moved(u: Any, given: Any) -> Any:
        def rows(change: Any) -> Any:
            whole = u.ravel().at[where].add(change).reshape(u.shape)
            return residual(equation, whole, given).ravel()

        zero = jnp.zeros(len(where), u.dtype)
        J = jax.jacfwd(rows)(zero)
        H = J.T @ J
        shift = 1e-12 * jnp.trace(H) / len(where) * jnp.eye(len(where), dtype=u.dtype)
        change = jax.scipy.linalg.cho_solve(
            jax.scipy.linalg.cho_factor(H + shift), -J.T @ rows(zero)
        )
        return u.ravel().at[where].add(change).reshape(u.shape)

    each = (jax.tree.map(lambda leaf, k=k: leaf[k], inputs) for k in range(len(u)))
    return jnp.stack([moved(one, given) for one, given in zip(u, each, strict=True)])
