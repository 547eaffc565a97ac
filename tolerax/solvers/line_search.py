"""Inexact line search: quasi-Newton steps on values and gradients that are known only to within
bounds, asking for accuracy only where a test needs it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tolerax.inner.lbfgs import Pairs, add_pair, inverse_product, no_pairs
from tolerax.solvers._common import Geometry, select
from tolerax.solvers._search import IntervalSearch
from tolerax.solvers._search_state import Answer, Direction, Incumbent, SearchState


class InexactLineSearch(IntervalSearch):
    """Line search with L-BFGS directions (or steepest descent) for inexact values and gradients.

    A trial is accepted when the *intervals* of the values show a sufficient decrease; a direction
    `d = -H z` is used when the bound on the gradient error shows that it descends,
    `gradient_error * |H z| <= (1 - eta) z'Hz`. When a test cannot be decided, state and adjoint
    accuracy are tightened by the term that dominates; otherwise the next request follows from how
    the last bounds depended on the achieved errors. On plain functions (error 0) this is an L-BFGS
    method with a backtracking, extrapolating line search.

    - `rtol`, `atol`: converged when `|projected gradient| + gradient_error <=
      atol + rtol * |projected gradient at x0|` (Euclidean norms).
    - `memory`: L-BFGS pairs; 0 gives steepest descent, with first steps of the length of Barzilai
      and Borwein (*IMA J. Numerical Analysis* 8, 1988).
    - `accuracy`: the first request.
    - `share`: the gradient error asked for, relative to the gradient.
    - `adaptive`: `False` keeps `accuracy` throughout (for comparisons).
    - `first_step`: factor on the length of the first trial step, `max(min(|z|, 1), |x0| / 100)`.

    Source: the interval test and the descent test are those of MAID (Salehi, Mukherjee, Roberts,
    Ehrhardt, arXiv 2308.10098); directions, corrected values and requests are our own.

    >>> import jax.numpy as jnp, tolerax
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> solver = tolerax.InexactLineSearch()
    >>> tolerax.solve(tolerax.Objective(rosenbrock), solver, jnp.array([-1.2, 1.0])).x.round(5)
    Array([1., 1.], dtype=float64)
    """

    memory: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory}: give 0 (steepest descent) or more.")

    def _new_model(self, x: Float[Array, " n"]) -> Pairs:
        return no_pairs(max(self.memory, 1), x)

    def _direction(
        self, state: SearchState, z: Float[Array, " n"], free: Array, answer: Answer
    ) -> Direction:
        geometry, pairs = answer.geometry, state.model
        if self.memory:
            h = inverse_product(pairs, z, free, geometry.riesz)
        else:
            s, y = self._last(pairs)
            sy = jnp.dot(s, y)
            length = jnp.where(sy > 0, geometry.norm(s) ** 2 / jnp.where(sy > 0, sy, 1), 1)
            h = jnp.where(free, length * geometry.riesz(z), 0)
        expected = geometry.stationarity(state.now.x, state.now.z)
        return Direction(h, pairs.count == 0, jnp.array(True), expected, pairs)

    def _learned(
        self, state: SearchState, told: Incumbent, keep: Array, gain: Array, geometry: Geometry
    ) -> Pairs:
        del gain, geometry
        pair = (told.x - state.now.x, told.z - state.now.z)
        return select(keep, add_pair(state.model, *pair), state.model)

    def _forgotten(self, state: SearchState) -> tuple[Pairs, Bool[Array, ""]]:
        return no_pairs(max(self.memory, 1), state.now.x), state.model.count > 0

    def _last(self, model: Pairs) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        newest = (model.count - 1) % model.s.shape[0]
        return model.s[newest], model.y[newest]
