"""Branches on a state, written with methods of a solver."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def chosen(index: Array, branches: list[Callable[[Any], Any]], state: Any) -> Any:
    """The branch of this number, applied. Methods of a solver with arrays in it cannot be hashed,
    which JAX asks for; functions can."""
    plain = [lambda s, branch=branch: branch(s) for branch in branches]
    return jax.lax.switch(index, plain, state)


def when(condition: Array, yes: Callable[[Any], Any], no: Callable[[Any], Any], state: Any) -> Any:
    """One of two branches, applied."""
    return chosen(condition.astype(jnp.int32), [no, yes], state)
