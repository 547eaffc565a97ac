"""The state of consensus-based optimization."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tolerax.solvers._common import Box

Positions = Float[Array, "n d"]


class CBOState(eqx.Module):
    """What evolves: the particles, their consensus, the best of the memory, the mode."""

    x: Positions
    noise: Any
    memory: tuple[Positions, Float[Array, " n"], Float[Array, " n"]] | None
    consensus: Float[Array, " d"]
    best: Float[Array, ""]
    best_violation: Float[Array, ""]
    best_x: Float[Array, " d"]
    effective: Float[Array, ""]
    width: Float[Array, ""]
    penalty: Float[Array, ""]
    scale: Float[Array, " d"]
    step: Int[Array, ""]
    agreeing: Int[Array, ""]
    key: PRNGKeyArray
    box: Box
    limits: tuple[Float[Array, " m"], Float[Array, " m"]] | None
    probing: Bool[Array, ""]
    probes: Int[Array, ""]
    failing: Int[Array, ""]
    done: Bool[Array, ""]
    status: Any
