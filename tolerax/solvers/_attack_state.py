"""What evolves in a run of attacks."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import State
from tolerax.inner.lbfgs import Pairs
from tolerax.solvers._attack_steps import Held
from tolerax.solvers._common import Box


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
