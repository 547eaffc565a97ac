"""Random numbers that cost little on a CPU: those of `jax.random`, bit for bit, but compiled well.

`jax.random` hashes counters in a loop of five rounds that XLA cannot fuse, for the shortest key as
for the longest array. Written out, the same hash becomes part of what uses it. Numbers belong to
their position in the array: where the array lies does not matter.

The hash is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as
easy as 1, 2, 3*, SC 2011).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int, PRNGKeyArray, UInt32

TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
BLOCKS = 64
# From so many numbers on they are drawn before they are used, and from so many on they would need
# memory of their own.
APART, LARGE = 100, 10**7


def blocks_of(count: int) -> int:
    """How many blocks of equal size `count` rows are treated in."""
    return math.gcd(count, BLOCKS)


def threefry(key: UInt32[Array, "2"], high: Array, low: Array) -> tuple[Array, Array]:
    """Two random words for each counter, whose two words are `high` and `low`."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for turn in TURNS[group % 2]:
            x = x + y
            y = x ^ ((y << turn) | (y >> (32 - turn)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _words(key: PRNGKeyArray) -> UInt32[Array, "2"]:
    """The two words of a key; drawn from it where it belongs to another generator."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def fold_in(key: PRNGKeyArray, number: Int[Array, ""] | int) -> PRNGKeyArray:
    """`jax.random.fold_in(key, number)`; also the key of this number in `jax.random.split`."""
    zero = jnp.zeros((), jnp.uint32)
    words = threefry(_words(key), zero, jnp.asarray(number).astype(jnp.uint32))
    return jax.random.wrap_key_data(jnp.stack(words), impl="threefry2x32")


def bits(key: PRNGKeyArray, counter: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """`jax.random.bits(key, shape)` at these positions of the flat array."""
    return _hashed(_words(key), counter)


def _hashed(words: UInt32[Array, "2"], counter: UInt32[Array, "*shape"]) -> Array:
    x, y = threefry(words, jnp.zeros_like(counter), counter)
    return x ^ y


def _unit(words: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Uniform in [0, 1): the upper 23 bits as the mantissa of a number in [1, 2)."""
    mantissa = (words >> 9) | jnp.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(mantissa, jnp.float32) - jnp.float32(1)


def _gaussian(words: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The inverse distribution function at uniform numbers in (-1, 1)."""
    low = np.nextafter(np.float32(-1), np.float32(0))
    u = jnp.maximum(_unit(words) * (np.float32(1) - low) + low, low)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(u)


def uniform(key: PRNGKeyArray, count: int) -> Float32[Array, " count"]:
    """`jax.random.uniform(key, (count,), float32)`."""
    return _unit(bits(key, jnp.arange(count, dtype=jnp.uint32)))


def normal(key: PRNGKeyArray, x: Array, over: NamedSharding | None = None) -> Array:
    """Standard normal numbers in the shape and type of x, drawn in float32: a step of a stochastic
    scheme does not resolve more, and they cost half of those in float64.

    They are `jax.random.normal(key, x.shape, float32)`. `over` is the sharding of x or `None`.

    >>> import jax, jax.numpy as jnp
    >>> key, x = jax.random.key(0), jnp.zeros((4, 3))
    >>> bool(jnp.all(normal(key, x) == jax.random.normal(key, (4, 3), jnp.float32)))
    True
    """
    size = x.size
    if size >= 2**32:
        raise ValueError(f"x has {size} entries: at most 2^32 random numbers are drawn at once.")
    if over is not None:
        return _in_blocks(key, x, over).astype(x.dtype)
    if size < APART or size > LARGE or size % 2:
        return _whole(size)(key).reshape(x.shape).astype(x.dtype)
    drawn = jax.lax.platform_dependent(key, cpu=_halves(size), default=_whole(size))
    return drawn.reshape(x.shape).astype(x.dtype)


def _in_blocks(key: PRNGKeyArray, x: Array, over: NamedSharding) -> Float32[Array, "*shape"]:
    """Every device draws for its own rows, block by block: blocks always have the same length, and
    code for other lengths may round differently."""
    block = x.size // blocks_of(x.shape[0])

    def local(words: Array, x: Array) -> Array:
        first = jax.lax.axis_index(over.mesh.axis_names) * (x.size // block)
        numbers = first.astype(jnp.uint32) + jnp.arange(x.size // block, dtype=jnp.uint32)
        counter = jnp.arange(block, dtype=jnp.uint32)
        draw = lambda number: _gaussian(_hashed(words, number * block + counter))  # noqa: E731
        return jax.lax.map(draw, numbers).reshape(x.shape)

    specs = (PartitionSpec(), over.spec)
    drawn = jax.shard_map(local, mesh=over.mesh, in_specs=specs, out_specs=over.spec)
    return drawn(_words(key), x)


def _whole(size: int) -> Callable[[PRNGKeyArray], Float32[Array, " size"]]:
    return lambda key: _gaussian(bits(key, jnp.arange(size, dtype=jnp.uint32)))


def _halves(size: int) -> Callable[[PRNGKeyArray], Float32[Array, " size"]]:
    """Both halves one after the other. XLA fuses nothing across a loop, and that is what it is for:
    in one kernel with what uses the numbers, rows whose length is no multiple of the vector width,
    or vectors of float64, slow the hash down."""
    half = size // 2

    def drawn(key: PRNGKeyArray) -> Float32[Array, " size"]:
        def draw(which: Array, drawn: Array) -> Array:
            start = which * half
            counter = start.astype(jnp.uint32) + jnp.arange(half, dtype=jnp.uint32)
            return jax.lax.dynamic_update_slice(drawn, _gaussian(bits(key, counter)), (start,))

        return jax.lax.fori_loop(0, 2, draw, jnp.zeros(size, jnp.float32))

    return drawn
