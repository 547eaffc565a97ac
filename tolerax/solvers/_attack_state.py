"""What evolves in a run of attacks."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import State
from tolerax.inner.lbfgs import Pairs
from tolerax.solvers._attack_steps import Held
from tolerax.solvers._common import Box

GRADIENT, LADDER, SCATTER, OTHER = range(4)
KINDS = 4  # sign, gradient, momentum, quasi-Newton
FACTORS = (4.0, 1.0, 0.25, 0.0625)  # of the length that was best before
RUNGS = KINDS * len(FACTORS)


class AttackState(eqx.Module):
    """The point that is attacked and what is known there, the ladder, and the states of the other
    solvers. Points are in the units of `unit`."""

    x: Float[Array, " n"]
    energy: Float[Array, ""]
    violation: Float[Array, ""]
    normal: Float[Array, " n"]
    back: Float[Array, ""]
    kinds: Float[Array, "kinds n"]
    before: tuple[Float[Array, " n"], Float[Array, " n"]]
    held: Held
    momentum: Float[Array, " n"]
    pairs: Pairs
    lengths: Float[Array, " kinds"]
    rungs: Float[Array, "rungs n"]
    mode: Int[Array, ""]
    began: Float[Array, ""]
    since: Float[Array, ""]
    gains: Float[Array, " recent"]
    others: tuple[State, ...]
    begins: Bool[Array, ""]
    turn: Int[Array, ""]
    spent: Int[Array, ""]
    burst: Int[Array, ""]
    over: Bool[Array, " others"]
    feasible: Bool[Array, ""]
    restarted: Int[Array, ""]
    at_turn: Float[Array, ""]
    penalty: Float[Array, ""]
    iteration: Int[Array, ""]
    attacks: Int[Array, ""]
    unit: Float[Array, " n"]
    box: Box
    limits: tuple[PyTree, PyTree] | None
    key: PRNGKeyArray
    done: Bool[Array, ""]
    status: Any

    def blocked(self, g: Float[Array, " n"]) -> Bool[Array, " n"]:
        """Where x is at a bound and the gradient pushes against it."""
        low, high = self.box.lower / self.unit, self.box.upper / self.unit
        return ((self.x <= low) & (g > 0)) | ((self.x >= high) & (g < 0))

    def filled(self, rungs: Float[Array, "some n"]) -> Float[Array, "rungs n"]:
        """As many rows as any attack asks for."""
        more = self.rungs.shape[0] - rungs.shape[0]
        return jnp.pad(rungs, ((0, more), (0, 0)), mode="edge")
