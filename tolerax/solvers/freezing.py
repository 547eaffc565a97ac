"""Consensus freezing: particles follow their equation exactly while the consensus stands still."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from tolerax.contracts import Accuracy, Evaluation, Query, Start
from tolerax.inner.noise import fold_in, normal
from tolerax.solvers._cbo_state import CBOState
from tolerax.solvers._population import (
    Population,
    check_count,
    check_spread,
)
from tolerax.solvers.cbo import CBO
from tolerax.solvers.consensus import Agreement, Consensus, HardMinimum, Noise
from tolerax.validation import check_options

Positions = Float[Array, "n d"]


class Frozen(Noise):
    """The exact flow over a time T with the consensus frozen: of
    `du = -lambda u dt + sigma diag(u) dB`, then of `du = -lambda u dt + noise`, whose stationary
    width is `width` times the spread of the start, falling by `shrink` in every step.

    - `decay`: lambda T; `s`: sigma sqrt(T).
    """

    decay: Any
    s: Any
    width: Any
    shrink: Any

    def init(self, x: Positions) -> Float[Array, ""]:
        return jnp.asarray(self.width, x.dtype)

    def update(self, memory: Array, x: Positions, agreed: Agreement, over: Any = None) -> Array:
        del x, agreed, over
        return memory * self.shrink

    def __call__(
        self,
        key: PRNGKeyArray,
        u: Positions,
        drifted: Positions,
        scale: Float[Array, " d"],
        weights: Array,
        memory: Array,
        over: Any = None,
    ) -> Positions:
        del drifted, weights
        one, two = fold_in(key, 0), fold_in(key, 1)
        within = u * jnp.exp(self.s * normal(one, u, over) - 0.5 * jnp.square(self.s) - self.decay)
        forgotten = jnp.sqrt(-jnp.expm1(-2 * jnp.asarray(self.decay, u.dtype)))
        return within + forgotten * memory * scale[None] * normal(two, u, over)

    def contraction(self, drift: float, d: int) -> float:
        del drift, d
        return -float(self.decay) - 0.5 * float(self.s) ** 2


class ConsensusFreezing(Population):
    """Consensus freezing: [`CBO`][] with steps of any length.

    While the consensus m stands still the equation of the particles can be solved exactly, so no
    length `interval` of a step makes it unstable:

        x <- m + exp(-(lambda + sigma^2 / 2) T + sigma sqrt(T) xi) (x - m)
               + s_k sqrt(1 - exp(-2 lambda T)) zeta

    with xi and zeta standard normal in every coordinate. The second noise does not vanish with the
    distance to m, which keeps the particles from agreeing too early; its width s_k falls by
    `shrink` in every step. For T to infinity particles forget where they were: that is
    [`ConsensusHopping`][]. For small T it is `CBO` with anisotropic noise. The run ends as one of
    `CBO`.

    - `particles`, `consensus`, `spread`, `ensemble`, `tol`, `patience`, `accuracy`, `sharding`: as
      of [`CBO`][].
    - `drift`: lambda; `sigma`: the strength of the noise that follows the distance; `interval`: T.
    - `width`: s_0 relative to the spread of the start. - `shrink`: its factor in every step; 1
      keeps the width, and the run ends with its budget.

    Source: Fornasier, Huang, Klemenc, Malaspina, *From consensus-based optimization to evolution
    strategies* (arXiv 2602.11677), for the idea; the noise is ours: the exact flow of the
    anisotropic noise followed by that of the constant one.

    >>> import jax.numpy as jnp, tolerax
    >>> rastrigin = lambda x: jnp.mean(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)
    >>> problem = tolerax.Objective(rastrigin, bounds=(-3.0, 5.0))
    >>> solver = tolerax.solvers.ConsensusFreezing()
    >>> solution = tolerax.solve(problem, solver, jnp.zeros(3) + 2.5)
    >>> bool(jnp.all(jnp.abs(solution.x) < 1e-2)), bool(solution.success)
    (True, True)
    """

    particles: int = eqx.field(static=True, default=100)
    consensus: Consensus = eqx.field(default_factory=HardMinimum)
    drift: float = 1.0
    sigma: float = 2.5
    interval: float = 0.1
    width: float = 0.5
    shrink: float = 0.98
    spread: PyTree = 1.0
    ensemble: PyTree = None
    tol: float = 1e-4
    patience: int = 10
    accuracy: Accuracy = eqx.field(default_factory=lambda: Accuracy(1e-4, 1e-4))
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count(self, "particles")
        check_spread(self.spread)
        positive = "drift interval shrink tol"
        check_options(self, positive=positive, at_least_0="sigma width patience")

    @property
    def _particles(self) -> CBO:
        """The particles, whose noise does the whole step."""
        s = self.sigma * jnp.sqrt(jnp.asarray(self.interval))
        solver = CBO(
            particles=self.particles,
            consensus=self.consensus,
            noise=Frozen(self.drift * self.interval, s, self.width, self.shrink),
            spread=self.spread,
            ensemble=self.ensemble,
            patience=self.patience,
            accuracy=self.accuracy,
            sharding=self.sharding,
        )
        # Set afterwards, since it may be traced.
        return eqx.tree_at(lambda cbo: cbo.tol, solver, self.tol)

    @property
    def honours_bounds(self) -> bool:
        return True

    @property
    def honours_constraints(self) -> bool:
        return True

    @property
    def feasibility(self) -> Any:
        return self._particles.feasibility

    def init(self, start: Start) -> CBOState:
        return self._particles.init(start)

    def ask(self, state: CBOState) -> Query:
        return self._particles.ask(state)

    def tell(self, state: CBOState, query: Query, evaluation: Evaluation) -> CBOState:
        return self._particles.tell(state, query, evaluation)

    def terminate(self, state: CBOState) -> tuple[Bool[Array, ""], Any]:
        return self._particles.terminate(state)

    def record(self, state: CBOState) -> dict[str, Array]:
        return self._particles.record(state)
