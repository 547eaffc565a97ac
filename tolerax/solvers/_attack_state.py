"""What evolves in a run of attacks."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from tolerax.contracts import State
from tolerax.inner.lbfgs import Pairs
from tolerax.solvers._attack_steps import Held
from tolerax.solvers._best import Best
from tolerax.solvers._common import Box

GRADIENT, LADDER, SCATTER, OTHER = range(4)
KINDS = 4  # sign, gradient, momentum, quasi-Newton
FACTORS = (4.0, 1.0, 0.25, 0.0625)  # of the length that was best before
RUNGS = KINDS * len(FACTORS)


class Turns(eqx.Module):
    """Whose turn it is (the attack is number 0), and what each has spent and found.

    - `spent`: points. `wins`: turns that found something notably better.
    - `left`: how high the best point was when its last turn ended. `over`: whether it has ended.
    - `own`: the lowest that it has seen itself since it began. `slow`: whether its last turn left
      it more than half as far above the best point as before.
    - `here`: points of this turn. `at`, `own_at`: how high the best point and its own were when the
      turn began. `ends`: whether the turn is over.
    - `first`: the value of the first feasible point. `verdict`: what the last one to end said.
    - `alike`: attacks from random points that ended as high as the best point; `various`: whether
      others did not.
    """

    number: Int[Array, ""]
    spent: Float[Array, " all"]
    wins: Float[Array, " all"]
    left: Float[Array, " all"]
    own: Float[Array, " all"]
    slow: Bool[Array, " all"]
    over: Bool[Array, " all"]
    here: Int[Array, ""]
    at: Float[Array, ""]
    own_at: Float[Array, ""]
    first: Float[Array, ""]
    verdict: Any
    alike: Int[Array, ""]
    various: Bool[Array, ""]
    ends: Bool[Array, ""]


class AttackState(eqx.Module):
    """The point that is attacked and what is known there, the best point, and the turns and the
    states of the other solvers. Points are in the units of `unit`."""

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
    mode: Int[Array, ""]
    next: Int[Array, ""]  # the mode in which the attack goes on
    since: Float[Array, ""]
    gains: Float[Array, " recent"]
    random: Bool[Array, ""]  # whether the attack began at a random point
    best: Best
    turns: Turns
    others: tuple[State, ...]
    penalty: Float[Array, ""]
    iteration: Int[Array, ""]
    attacks: Int[Array, ""]
    unit: Float[Array, " n"]
    box: Box
    limits: tuple[PyTree, PyTree] | None
    key: PRNGKeyArray
    done: Bool[Array, ""]
    status: Any

    @property
    def sides(self) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The bounds, in the same units as the points."""
        return self.box.lower / self.unit, self.box.upper / self.unit

    def blocked(self, g: Float[Array, " n"]) -> Bool[Array, " n"]:
        """Where x is at a bound and the gradient pushes against it."""
        low, high = self.sides
        return ((self.x <= low) & (g > 0)) | ((self.x >= high) & (g < 0))
