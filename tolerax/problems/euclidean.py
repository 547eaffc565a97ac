"""State and adjoint solves with error bounds in the Euclidean norm, as published."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from tolerax.contracts import Provenance, Work
from tolerax.inner.bounds import dual_norm
from tolerax.inner.estimates import largest_singular_value
from tolerax.inner.krylov import CG
from tolerax.inner.minimizers import NO_LIMIT, Limit, Smooth
from tolerax.problems.energy import Known, Minimization, merged
from tolerax.problems.implicit import Fixed, Solved
from tolerax.problems.norms import SAFETY, Errors, estimate_cross

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


class ByResidual(Smooth):
    """A lower level whose distances are bounded by gradients alone, `|y - y*|_D <= |r|_{D^-1}`."""

    def distance(
        self, r: Vector, rounding: Scalar, decrement: ArrayLike = jnp.inf
    ) -> tuple[Scalar, Scalar]:
        del decrement
        bound = dual_norm(r, self.lower_bound) + rounding
        return bound, self.self_concordance * bound / jnp.sqrt(jnp.min(self.lower_bound))

    def decrement_for(self, tolerance: ArrayLike) -> Scalar:
        return jnp.zeros_like(self.self_concordance)


class Euclidean(Minimization):
    """Errors in the Euclidean norm, as published; kept for comparisons.

    `Accuracy.state` bounds `|y - y*|` by `|grad h| / mu`, `Accuracy.adjoint` bounds the residual
    `|H q - grad_y J|`. The value is not corrected: `J(y) +- (|grad J| eps + L_g eps^2 / 2)`.

    Source: Salehi, Mukherjee, Roberts, Ehrhardt (arXiv 2308.10098) for the value; Ehrhardt and
    Roberts, *Analyzing inexact hypergradients* (IMA J. Appl. Math. 2023) for the gradient, here
    with the term of a Hessian that varies, `L_H <= M |H|`. The norms of H and of the cross
    derivative are estimated by power iteration, whatever else is known.
    """

    @property
    def provenance(self) -> Provenance:
        """Which constants are given, proved or estimated."""
        known = [pair for pair in super().provenance.constants if pair[0] != "cross"]
        return Provenance((*known, ("cross", "estimated"), ("hessian_norm", "estimated")))

    def solve_state(
        self,
        at: Fixed,
        known: Known,
        y: Vector,
        tolerance: Scalar,
        limit: Limit = NO_LIMIT,
    ) -> Solved:
        mu = jnp.min(known.lower_bound)
        flat = dataclasses.replace(known, lower_bound=jnp.full_like(y, mu), memory=None)
        # |r|_{D^-1} = |r| / sqrt(mu) <= sqrt(mu) eps is |r| <= mu eps.
        root = jnp.sqrt(mu)
        hopeless = limit.hopeless
        if hopeless is not None:
            limit = limit._replace(hopeless=lambda y, t: hopeless(y, t / root))
        solved = self._state(at, flat, y, root * tolerance, limit)
        return eqx.tree_at(lambda s: s.error, solved, solved.error / root)

    def smooth(self, at: Fixed, known: Known) -> Smooth:
        lower = super().smooth(at, known)
        m, resembling = lower.self_concordance, lower.preconditioner
        return ByResidual(lower.value, lower.lower_bound, m, resembling, lower.along)

    def solve_adjoint(
        self, at: Fixed, known: Known, y: Vector, b: Vector, guess: Vector, tolerance: Scalar
    ) -> Solved:
        mu = jnp.min(known.lower_bound)
        flat = dataclasses.replace(known, lower_bound=jnp.full_like(y, mu), memory=None)
        residual_only = eqx.tree_at(
            lambda s: s.adjoint_solver, self, CG(self.adjoint_solver.max_steps, quadrature=False)
        )
        solve, solved = residual_only._adjoint(at, flat, y, b, guess, tolerance / jnp.sqrt(mu))
        return eqx.tree_at(lambda s: s.error, solved, jnp.linalg.norm(solve.residual))

    def least_value(self, at: Fixed, known: Known, error: Scalar, j: Scalar, g_y: Vector) -> Scalar:
        del at, known
        return j - jnp.linalg.norm(g_y) * error

    def errors(
        self, at: Fixed, known: Known, state: Solved, adjoint: Solved, j: Scalar, g_y: Vector
    ) -> tuple[Scalar, Errors, dict[str, Array], Work]:
        y, q, eps = state.vector, adjoint.vector, state.error
        mu = jnp.min(known.lower_bound)
        cross, products = estimate_cross(at, jnp.ones_like(y), y, q)
        # Power iteration from a fixed start for |H| and |Hess_yy J|.
        wave = jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype))
        h_map = jax.linearize(at.residual, y)[1]
        h_norm, _ = largest_singular_value(h_map, h_map, wave)
        if self.upper_smoothness is None:
            g_map = jax.linearize(jax.grad(at.cost), y)[1]
            l_g = SAFETY * largest_singular_value(g_map, g_map, wave)[0]
            products += 4
        else:
            l_g = at.constant(self.upper_smoothness)
        l_h = known.self_concordance * SAFETY * h_norm
        change = (l_g + l_h * jnp.linalg.norm(q)) / mu
        from_state = cross.state * eps + (cross.adjoint + cross.both * eps) * change * eps
        from_adjoint = (cross.adjoint + cross.both * eps) * adjoint.error / mu
        value = jnp.linalg.norm(g_y) * eps + 0.5 * l_g * eps * eps
        # Linear solves report errors in the energy norm, which is at least sqrt(mu) times this one.
        root = jnp.sqrt(mu)
        per_state = (cross.state + cross.adjoint * change) / root
        errors = Errors(value, from_state, from_adjoint, per_state, cross.adjoint / root)
        estimates = merged(state.estimates, adjoint.estimates)
        return j, errors, estimates, Work(hessian_products=products + 4)
