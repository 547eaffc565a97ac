"""State and adjoint solves for general equations F(y, x) = 0, with errors by stability."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from tolerax.contracts import Provenance, Work
from tolerax.inner.estimates import largest_singular_value
from tolerax.inner.general import GMRES
from tolerax.inner.krylov import LinearResult
from tolerax.inner.roots import NewtonKrylov
from tolerax.problems.constants import constant, origin
from tolerax.problems.implicit import Carry, Fixed, Solved
from tolerax.problems.norms import SAFETY, CrossBounds, Errors, estimate_cross
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


INVERSE_STEPS = 3


class KnownStability(eqx.Module):
    """The constants at one x: stability c, curvature L_F, smoothness L_J, estimates."""

    stability: Scalar
    curvature: Scalar
    smoothness: Scalar
    estimates: dict[str, Array]
    work: Work


class Stability(eqx.Module):
    """Errors in the Euclidean norm of a state that solves a general equation.

    `Accuracy.state` bounds `|y - y*|`, `Accuracy.adjoint` bounds `|q - F_y^-T J_y|`, both by
    residuals over the stability constant c (Newton-Kantorovich for the state).

    - `stability`: c with `|F_y^-1| <= 1/c` near the state. Estimated by inverse iteration when
      `None` (six more linear solves an evaluation, to one digit).
    - `curvature`: Lipschitz constant of F_y in y; 0 for a linear equation.
    - `smoothness`: Lipschitz constant of J_y in y.
    - `cross`: callable (y, q, x) -> [`CrossBounds`][], with Euclidean norms for energy norms.
    - `state_solver`: [`NewtonKrylov`][]; `adjoint_solver`: [`GMRES`][], [`BiCGStab`][], or [`CG`][]
      where F_y is symmetric and at least c. Any callable with their signature will do.

    The value is corrected by the adjoint, as everywhere: with e = y - y* and s = J_y - F_y'q its
    error is at most `|s||e| + (L_J + L_F |q|) |e|^2 / 2`, that of the gradient
    `B2 |e| + (B1 + B12 |e|) (|s| + (L_J + L_F |q|) |e|) / c`.
    """

    stability: Any = None
    curvature: Any = None
    smoothness: Any = None
    cross: Any = None
    state_solver: Any = eqx.field(default_factory=NewtonKrylov)
    adjoint_solver: Any = eqx.field(default_factory=GMRES)

    @property
    def provenance(self) -> Provenance:
        """Which constants are given, proved or estimated."""
        names = ("stability", "curvature", "smoothness", "cross")
        return Provenance(tuple((name, origin(getattr(self, name))) for name in names))

    def first_estimates(self, y: Vector) -> dict[str, Array]:
        """The part of the carry that holds estimates: empty when every constant is known."""
        return {"softest": _wave(y)} if self.stability is None else {}

    def constants(self, at: Fixed, carry: Carry) -> KnownStability:
        """The constants at x, measured at the guess where they are neither given nor proved."""
        y, estimates, products = carry.y, dict(carry.estimates), 0
        dtype, tiny = y.dtype, jnp.finfo(y.dtype).tiny
        work = Work()
        if self.stability is None:
            operator = jax.linearize(at.residual, y)[1]
            transpose = lambda w: jax.vjp(at.residual, y)[1](w)[0]  # noqa: E731
            loose = {"lower_bound": jnp.ones_like(y), "tolerance": 0.0, "relative": 0.1}

            def inverse_step(_: Any, state: tuple) -> tuple:
                v, _, products = state
                v = v / jnp.maximum(jnp.linalg.norm(v), tiny)
                first = self.adjoint_solver(transpose, v, **loose)
                second = self.adjoint_solver(operator, first.x, **loose)
                # |A^-1 A^-T v| is at most 1 / sigma_min^2.
                size = jnp.linalg.norm(second.x)
                return second.x, size, products + first.products + second.products

            zero = jnp.zeros((), dtype)
            start = (estimates["softest"], zero, jnp.array(0, jnp.result_type(int)))
            v, size, inverse_products = jax.lax.fori_loop(0, INVERSE_STEPS, inverse_step, start)
            c = 1 / jnp.sqrt(jnp.maximum(size, tiny)) / SAFETY
            estimates["softest"] = v / jnp.maximum(size, tiny) + 1e-2 * _wave(y)
            work = work + Work(hessian_products=inverse_products)
        else:
            c = at.constant(self.stability).astype(dtype)
        curvature = self._lipschitz(self.curvature, at, at.residual, y)
        smoothness = self._lipschitz(self.smoothness, at, jax.grad(at.cost), y)
        products += 4 * (self.curvature is None) + 4 * (self.smoothness is None)
        work = work + Work(hessian_products=products)
        return KnownStability(c, curvature, smoothness, estimates, work)

    def _lipschitz(self, value: Any, at: Fixed, function: Any, y: Vector) -> Scalar:
        """A given constant; or an estimate: of the size of the second derivative of the residual
        along a fixed direction, or of the first derivative of J_y."""
        if value is not None:
            return jnp.asarray(constant(value, at.x), y.dtype)
        if function == at.residual:
            wave = _wave(y)
            u = wave / jnp.linalg.norm(wave)
            along = lambda z: jax.jvp(at.residual, (z,), (u,))[1]  # noqa: E731
        else:
            along = function
        forward = jax.linearize(along, y)[1]
        backward = jax.linear_transpose(forward, y)
        estimate, _ = largest_singular_value(forward, lambda w: backward(w)[0], _wave(y))
        return SAFETY * estimate

    def solve_state(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        tolerance: Scalar,
        effort: ArrayLike = jnp.inf,
    ) -> Solved:
        """Solve for the state from the guess y until its error is at most the tolerance."""
        del effort  # Newton's method with GMRES has its own, small limit of steps
        solve = self.state_solver(
            at.residual, y, tolerance, stability=known.stability, curvature=known.curvature
        )
        work = known.work + Work(
            lower_gradients=solve.evaluations,
            hessian_products=solve.products,
            linear_iterations=solve.products,
        )
        zero = jnp.zeros((), y.dtype)
        return Solved(
            solve.y, solve.residual, solve.distance, zero, work, solve.status, known.estimates
        )

    def solve_linear(
        self, at: Fixed, known: KnownStability, y: Vector, b: Vector, tolerance: Scalar
    ) -> LinearResult:
        """Solve with F_y at y."""
        operator = jax.linearize(at.residual, y)[1]
        bound = jnp.full_like(y, known.stability)
        return self.adjoint_solver(operator, b, lower_bound=bound, tolerance=tolerance)

    def solve_transpose(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        b: Vector,
        tolerance: Scalar,
        guess: Vector | None = None,
    ) -> LinearResult:
        """Solve with the transpose of F_y at y."""
        pullback = jax.vjp(at.residual, y)[1]
        bound = jnp.full_like(y, known.stability)
        return self.adjoint_solver(
            lambda w: pullback(w)[0],
            b,
            lower_bound=bound,
            tolerance=tolerance,
            guess=guess,
            exact_residual=True,
        )

    def solve_adjoint(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        b: Vector,
        guess: Vector,
        tolerance: Scalar,
    ) -> Solved:
        """Solve `F_y' q = b` at y from a guess until the error is at most the tolerance."""
        solve = self.solve_transpose(at, known, y, b, tolerance, guess)
        status = PointStatus.where(solve.converged, PointStatus.ok, PointStatus.inaccurate)
        work = Work(hessian_products=solve.products, linear_iterations=solve.iterations)
        error = jnp.linalg.norm(solve.residual) / known.stability
        zero = jnp.zeros((), y.dtype)
        return Solved(solve.x, solve.residual, error, zero, work, status, {})

    def least_value(self, known: KnownStability, state: Solved, j: Scalar, g_y: Vector) -> Scalar:
        """About the least value at the exact state, to first order, without an adjoint."""
        del known
        return j - jnp.linalg.norm(g_y) * state.error

    def errors(
        self,
        at: Fixed,
        known: KnownStability,
        state: Solved,
        adjoint: Solved,
        j: Scalar,
        g_y: Vector,
    ) -> tuple[Scalar, Errors, dict[str, Array], Work]:
        """The value, bounds on the errors, the estimates to carry on and the work they took."""
        del g_y
        y, q, t = state.vector, adjoint.vector, state.error
        s = jnp.linalg.norm(adjoint.residual)
        products = 0
        if self.cross is None:
            cross, products = estimate_cross(at, jnp.ones_like(y), y, q)
        else:
            cross: CrossBounds = constant(self.cross, at.unravel(y), at.unravel(q), at.x)
        bend = known.smoothness + known.curvature * jnp.linalg.norm(q)
        value = s * t + 0.5 * bend * t * t
        factor = (cross.adjoint + cross.both * t) / known.stability
        errors = Errors(value, cross.state * t + factor * bend * t, factor * s)
        corrected = j - jnp.dot(q, state.residual)
        return corrected, errors, dict(state.estimates), Work(hessian_products=products)


def _wave(y: Vector) -> Vector:
    """A fixed vector with components along every direction."""
    return jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype))
