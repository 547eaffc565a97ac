"""The drift of particles towards where constraints hold, by an implicit step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from tolerax.contracts import Evaluation


def linearized(
    evaluation: Evaluation, limits: tuple[Array, Array]
) -> tuple[Float[Array, "n m"], Float[Array, "n m d"]]:
    """By how much each particle is out of each constraint, and the Jacobian with rows of 0 for
    inequalities that hold."""

    def of_one(values: PyTree, jacobian: Any) -> tuple[Array, Array]:
        flat, unravel = ravel_pytree(values)
        eye = jnp.eye(flat.size, dtype=flat.dtype)
        rows = jax.vmap(lambda v: ravel_pytree(jacobian.rmv(unravel(v)))[0])(eye)
        low, high = limits
        out = flat - jnp.clip(flat, low, high)
        return out, jnp.where(((low == high) | (out != 0))[:, None], rows, 0)

    return eqx.filter_vmap(of_one)(evaluation.constraints, evaluation.jacobian)


def implicit_step(
    rate: ArrayLike, step: Array, ok: Array, out: Float[Array, " m"], rows: Float[Array, "m d"]
) -> Float[Array, " d"]:
    """The step `(I + rate J'J)^-1 (step - rate J'c)`, by the formula of Woodbury."""
    usable = ok & jnp.all(jnp.isfinite(rows)) & jnp.all(jnp.isfinite(out))
    rows, out = jnp.where(usable, rows, 0), jnp.where(usable, out, 0)
    matrix = jnp.eye(out.size, dtype=step.dtype) + rate * (rows @ rows.T)
    solve = jax.scipy.linalg.cho_factor(matrix, lower=True)
    return step - rate * (rows.T @ jax.scipy.linalg.cho_solve(solve, out + rows @ step))
