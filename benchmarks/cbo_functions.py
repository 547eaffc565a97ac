"""Functions with many local minima and one global one, shifted and rotated; for JAX and NumPy.

Each takes points z of shape (..., d) and has its minimum 0 at z = 0.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

BOX = 3.0  # particles start uniformly in [-BOX, BOX]^d, rotated functions are shifted less far
FAR = 2.0


def sphere(z: Any, np: Any = jnp) -> Any:
    return np.sum(z * z, axis=-1)


def rastrigin(z: Any, np: Any = jnp) -> Any:
    return np.mean(z * z - 10 * np.cos(2 * np.pi * z) + 10, axis=-1)


def ackley(z: Any, np: Any = jnp) -> Any:
    bowl = -20 * np.exp(-0.2 * np.sqrt(np.mean(z * z, axis=-1)))
    return bowl - np.exp(np.mean(np.cos(2 * np.pi * z), axis=-1)) + 20 + np.e


def griewank(z: Any, np: Any = jnp) -> Any:
    """The argument is scaled by 20: so the start box holds many of the local minima."""
    z = 20 * z
    root = np.sqrt(np.arange(1, z.shape[-1] + 1)).astype(z.dtype)
    return np.sum(z * z, axis=-1) / 4000 - np.prod(np.cos(z / root), axis=-1) + 1


class Moved(eqx.Module):
    """`fun(R (x - shift))` with a rotation R, the identity when `None`."""

    fun: Callable = eqx.field(static=True)
    shift: Any
    rotation: Any = None

    def __call__(self, x: Any) -> Any:
        z = x - self.shift
        if self.rotation is not None:
            z = z @ self.rotation.T
        return self.fun(z, np if isinstance(z, np.ndarray) else jnp)

    def numpy(self) -> "Moved":
        """The same function for NumPy arrays."""
        return jax.tree.map(np.asarray, self)


class Draw(eqx.Module):
    """A function of d unknowns, drawn from a key."""

    fun: Callable = eqx.field(static=True)

    @abc.abstractmethod
    def __call__(self, key: PRNGKeyArray, d: int) -> Moved: ...


class Shifted(Draw):
    """Always the same shift, in every coordinate."""

    by: Any = eqx.field(converter=jnp.asarray, default=1.0)

    def __call__(self, key: PRNGKeyArray, d: int) -> Moved:
        return Moved(self.fun, jnp.full(d, self.by))


class ShiftedAnyhow(Draw):
    """A shift drawn uniformly from [-FAR, FAR]^d."""

    def __call__(self, key: PRNGKeyArray, d: int) -> Moved:
        return Moved(self.fun, jax.random.uniform(key, (d,), minval=-FAR, maxval=FAR))


class Rotated(Draw):
    """A shift as in `ShiftedAnyhow` and a random rotation."""

    def __call__(self, key: PRNGKeyArray, d: int) -> Moved:
        shift, turn = jax.random.split(key)
        moved = ShiftedAnyhow(self.fun)(shift, d)
        return Moved(self.fun, moved.shift, jax.random.orthogonal(turn, d))


class Failing(eqx.Module):
    """A function that is NaN at a share of all points, which points being decided by a hash of
    their bits: the same point always fails or never does."""

    fun: Callable
    share: float = 0.1

    def __call__(self, x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        h = jnp.asarray(2166136261, jnp.uint32)
        for word in words:
            h = (h ^ word) * jnp.asarray(16777619, jnp.uint32)
        # The multiplications carry bits upwards only, so the high ones are folded back.
        for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            h = (h ^ (h >> shift)) * jnp.asarray(odd, jnp.uint32)
        h = h ^ (h >> 16)
        return jnp.where(h < int(self.share * 2**32), jnp.nan, self.fun(x))
