"""Sums and random numbers over particles that do not depend on how the particles are placed.

Particles are rows of arrays of shape (N, d). Where they are spread over devices, every device sums
whole blocks of rows, and the block sums are added in one fixed order, so that the order does not
depend on the number of devices. Random numbers are those of their position in the whole array.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

BLOCKS = 64


def blocks_of(count: int) -> int:
    """How many blocks of equal size `count` rows are summed in."""
    return math.gcd(count, BLOCKS)


def replicated(x: Array, sharding: NamedSharding | None) -> Array:
    """The same array on every device."""
    if sharding is None:
        return x
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def distributed(x: Array, sharding: NamedSharding | None) -> Array:
    """Rows of an array over the devices, as `sharding` says for the leading axis."""
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding)


def total(x: Float[Array, "n *rest"], sharding: NamedSharding | None = None) -> Array:
    """The sum over the rows, in blocks."""
    if sharding is None:
        return jnp.sum(x, axis=0)
    blocks = blocks_of(x.shape[0])
    parts = jnp.sum(x.reshape(blocks, -1, *x.shape[1:]), axis=1)
    return jnp.sum(replicated(parts, sharding), axis=0)


def weighted_mean(
    w: Float[Array, " n"], x: Float[Array, "n d"], sharding: NamedSharding | None = None
) -> Float[Array, " d"]:
    """`sum_i w_i x_i / sum_i w_i`."""
    if sharding is None:
        return (w @ x) / jnp.sum(w)
    return total(w[:, None] * x, sharding) / total(w, sharding)


def normal(key: PRNGKeyArray, x: Array) -> Array:
    """Standard normal numbers in the shape of x, drawn in float32: a step of a stochastic scheme
    does not resolve more, and they cost half of those in float64."""
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
