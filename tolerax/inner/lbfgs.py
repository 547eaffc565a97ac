"""Limited-memory quasi-Newton directions (two-loop recursion; Nocedal & Wright, algorithm 7.4)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Pairs(eqx.Module):
    """The last steps `s` and gradient changes `y`, newest in row `count - 1` modulo the memory."""

    s: Float[Array, "memory n"]
    y: Float[Array, "memory n"]
    count: Int[Array, ""]


def no_pairs(memory: int, x: Float[Array, " n"]) -> Pairs:
    """An empty memory for vectors like `x`."""
    empty = jnp.zeros((memory, x.size), x.dtype)
    return Pairs(empty, empty, jnp.array(0, jnp.int32))


def add_pair(pairs: Pairs, s: Float[Array, " n"], y: Float[Array, " n"]) -> Pairs:
    """The memory with one more pair; the oldest is forgotten when it is full."""
    row = pairs.count % pairs.s.shape[0]
    return Pairs(pairs.s.at[row].set(s), pairs.y.at[row].set(y), pairs.count + 1)


def inverse_product(
    pairs: Pairs,
    z: Float[Array, " n"],
    free: Bool[Array, " n"],
    riesz: Callable[[Float[Array, " n"]], Float[Array, " n"]] = lambda g: g,
) -> Float[Array, " n"]:
    """`H z` on the free variables, with `H` the L-BFGS inverse Hessian there (0 elsewhere).

    Pairs are restricted to the free variables; those that keep less than a fifth of their curvature
    there are left out: what is left of it is a difference of larger parts, and its inverse would
    make long steps of it. With an empty memory this is `z`, or `riesz(z)`: the inverse of the inner
    product in which x is measured takes the place of the identity that H is built from.
    """
    memory = pairs.s.shape[0]
    order = (pairs.count - 1 - jnp.arange(memory)) % memory  # newest first
    s, y = jnp.where(free, pairs.s[order], 0), jnp.where(free, pairs.y[order], 0)
    sy, yy = jnp.sum(s * y, axis=1), jnp.sum(y * y, axis=1)
    floor = 10 * jnp.finfo(z.dtype).eps * jnp.sqrt(jnp.sum(s * s, axis=1) * yy)
    usable = (jnp.arange(memory) < pairs.count) & (sy > floor)
    usable = usable & (sy >= 0.2 * jnp.sum(pairs.s[order] * pairs.y[order], axis=1))
    rho = jnp.where(usable, 1 / jnp.where(usable, sy, 1), 0)
    z = jnp.where(free, z, 0)

    def down(q: Array, pair: tuple) -> tuple[Array, Array]:
        s, y, rho = pair
        a = rho * jnp.dot(s, q)
        return q - a * y, a

    q, a = jax.lax.scan(down, z, (s, y, rho))
    newest = jnp.argmax(usable)
    yry = jnp.dot(y[newest], riesz(y[newest]))
    known = jnp.any(usable)
    scale = jnp.where(known, sy[newest] / jnp.where(known, yry, 1), 1)

    def up(r: Array, pair: tuple) -> tuple[Array, None]:
        s, y, rho, a = pair
        return r + s * (a - rho * jnp.dot(y, r)), None

    r, _ = jax.lax.scan(up, scale * jnp.where(free, riesz(q), 0), (s, y, rho, a), reverse=True)
    return r
