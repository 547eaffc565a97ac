"""State and adjoint solves for general equations F(y, x) = 0, with errors by stability."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from tolerax.contracts import Provenance, Work
from tolerax.inner.estimates import largest_singular_value, smallest_eigenvalue
from tolerax.inner.gmres import GMRES
from tolerax.inner.krylov import LinearResult
from tolerax.inner.minimizers import NO_LIMIT, Limit
from tolerax.inner.minres import MINRES
from tolerax.inner.roots import NewtonKrylov, dual_size
from tolerax.problems.constants import constant, origin
from tolerax.problems.implicit import Carry, Fixed, Solved
from tolerax.problems.norms import SAFETY, CrossBounds, Errors, estimate_cross_in
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]
Inverse = Callable[[Vector], Vector]

INVERSE_STEPS = 3
LANCZOS_STEPS = 12
CONTRADICTED = 2.0  # by how much pairs must disagree with a constant; less may be rounding
NO_LAST_LOOK = {"exact_residual": False}


class KnownStability(eqx.Module):
    """The constants at one x: stability c, curvature L_F, smoothness L_J, estimates."""

    stability: Scalar
    curvature: Scalar
    smoothness: Scalar
    estimates: dict[str, Array]
    work: Work


class Stability(eqx.Module):
    """Errors of a state that solves a general equation, by the stability of that equation.

    States and adjoints are measured by `|e|_R = sqrt(e'R e)`, residuals by `|r|_{R^-1}`, where R is
    the Riesz map of the state space: for an elliptic equation the Laplacian. `Accuracy.state`
    bounds `|y - y*|_R`, `Accuracy.adjoint` bounds `|q - F_y^-T J_y|_R`, both by residuals over the
    stability constant c (Newton-Kantorovich for the state).

    - `riesz`: callable x -> (r -> R^-1 r), on pytrees like y; it is the preconditioner of all
      solves too. `None`: R is the identity, all norms are Euclidean.
    - `stability`: c with `|F_y e|_{R^-1} >= c |e|_R` near the state. Estimated when `None`: by
      Lanczos steps with a Riesz map, else by inverse iteration (six more linear solves an
      evaluation, to one digit). A given one is held against what state and adjoint solves see:
      corrections twice as long as it allows end the run (`Status.contradicted`).
    - `curvature`: L_F with `|(F_y(y + e) - F_y(y)) w|_{R^-1} <= L_F |e|_R |w|_R`; 0 for a linear
      equation.
    - `smoothness`: L_J with `|J_y(y + e) - J_y(y)|_{R^-1} <= L_J |e|_R`.
    - `cross`: callable (y, q, x) -> [`CrossBounds`][], with R-norms for energy norms.
    - `monotone`: the stability holds between any two states, `|F(y) - F(z)|_{R^-1} >= c |y - z|_R`;
      the distance to the state is then known however far it is.
    - `state_solver`: [`NewtonKrylov`][]; `adjoint_solver`: [`GMRES`][], [`MINRES`][] where F_y is
      symmetric, or another method with their signature.

    Products with F_y and its transpose count as `linear_iterations`; with a Riesz map every
    application of R^-1 counts as one of `pde_solves`, otherwise residuals count as
    `lower_gradients` and products as `hessian_products`.

    The value is corrected by the adjoint, as everywhere: with e = y - y* and s = J_y - F_y'q its
    error is at most `|s||e| + (L_J + L_F |q|) |e|^2 / 2`, that of the gradient
    `B2 |e| + (B1 + B12 |e|) (|s| + (L_J + L_F |q|) |e|) / c`.
    """

    stability: Any = None
    curvature: Any = None
    smoothness: Any = None
    cross: Any = None
    monotone: bool = eqx.field(static=True, default=False)
    riesz: Callable[[Any], Callable[[Any], Any]] | None = None
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

    def inverse(self, at: Fixed) -> Inverse | None:
        """R^-1 at x on flat vectors."""
        if self.riesz is None:
            return None
        apply = self.riesz(at.x)
        if not callable(apply):
            raise TypeError(
                "riesz returned an array: give a callable u -> (r -> R^-1 r), for instance "
                "`lambda u: laplacian.solve`."
            )
        return lambda r: ravel_pytree(apply(at.unravel(r)))[0]

    def work(self, products: ArrayLike, residuals: ArrayLike = 0, solves: ArrayLike = 0) -> Work:
        """What products with F_y, residuals, and applications of R^-1 without a product cost."""
        if self.riesz is None:
            return Work(
                lower_gradients=residuals, hessian_products=products, linear_iterations=products
            )
        # A step of a Krylov method applies R^-1 once.
        return Work(pde_solves=products + solves, linear_iterations=products)

    def constants(self, at: Fixed, carry: Carry) -> KnownStability:
        """The constants at x, measured at the guess where they are neither given nor proved."""
        y, estimates = carry.y, dict(carry.estimates)
        inverse = self.inverse(at)
        work = Work()
        if self.stability is None:
            c, softest, products = self._estimate_stability(at, y, estimates["softest"], inverse)
            estimates["softest"] = softest
            work = work + self.work(products)
        else:
            c = at.constant(self.stability).astype(y.dtype)
        curvature = self._lipschitz(self.curvature, at, at.residual, y, inverse)
        smoothness = self._lipschitz(self.smoothness, at, jax.grad(at.cost), y, inverse)
        products = 4 * (self.curvature is None) + 4 * (self.smoothness is None)
        return KnownStability(c, curvature, smoothness, estimates, work + self.work(products))

    def _estimate_stability(
        self, at: Fixed, y: Vector, start: Vector, inverse: Inverse | None
    ) -> tuple[Scalar, Vector, ArrayLike]:
        """The constant c, a vector to begin with next time, and products."""
        tiny = jnp.finfo(y.dtype).tiny
        operator = jax.linearize(at.residual, y)[1]
        pullback = jax.linear_transpose(operator, y)
        transpose = lambda w: pullback(w)[0]  # noqa: E731
        if inverse is not None:
            normal = lambda v: transpose(inverse(operator(v)))  # noqa: E731
            square, softest = smallest_eigenvalue(normal, start, LANCZOS_STEPS, inverse)
            c = jnp.sqrt(jnp.maximum(square, tiny)) / SAFETY
            return c, softest + 1e-2 * _wave(y) * jnp.linalg.norm(softest), 2 * LANCZOS_STEPS
        loose = {"tolerance": 0.0, "relative": 0.1}

        def inverse_step(_: Any, state: tuple) -> tuple:
            v, _, products = state
            v = v / jnp.maximum(jnp.linalg.norm(v), tiny)
            first = self.adjoint_solver(transpose, v, **loose)
            second = self.adjoint_solver(operator, first.x, **loose)
            # |A^-1 A^-T v| is at most 1 / sigma_min^2.
            size = jnp.linalg.norm(second.x)
            return second.x, size, products + first.products + second.products

        begin = (start, jnp.zeros((), y.dtype), jnp.array(0, jnp.result_type(int)))
        v, size, products = jax.lax.fori_loop(0, INVERSE_STEPS, inverse_step, begin)
        c = 1 / jnp.sqrt(jnp.maximum(size, tiny)) / SAFETY
        return c, v / jnp.maximum(size, tiny) + 1e-2 * _wave(y), products

    def _lipschitz(
        self, value: Any, at: Fixed, function: Any, y: Vector, inverse: Inverse | None
    ) -> Scalar:
        """A given constant; or an estimate: of the size of the second derivative of the residual
        along a fixed direction, or of the first derivative of J_y."""
        if value is not None:
            return jnp.asarray(constant(value, at.x), y.dtype)
        dual = (lambda r: r) if inverse is None else inverse
        wave = _wave(y)
        if function == at.residual:
            v = dual(wave)
            u = v / jnp.sqrt(jnp.dot(v, wave))
            along = lambda z: jax.jvp(at.residual, (z,), (u,))[1]  # noqa: E731
        else:
            along = function
        forward = jax.linearize(along, y)[1]
        backward = jax.linear_transpose(forward, y)
        # The largest |forward e|_{R^-1} over |e|_R is that of the transpose, and this one starts
        # from and is measured in the same norms without products with R.
        estimate, _ = largest_singular_value(
            lambda w: backward(dual(w))[0], lambda v: forward(v), wave, dual=dual
        )
        return SAFETY * estimate

    def solve_state(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        tolerance: Scalar,
        limit: Limit = NO_LIMIT,
    ) -> Solved:
        """Solve for the state from the guess y until its error is at most the tolerance."""
        del limit  # Newton's method with GMRES has its own, small limit of steps
        solve = self.state_solver(
            at.residual,
            y,
            tolerance,
            stability=known.stability,
            curvature=known.curvature,
            preconditioner=self.inverse(at),
            everywhere=self.monotone,
        )
        work = known.work + self.work(solve.products, solve.evaluations, solve.evaluations)
        zero = jnp.zeros((), y.dtype)
        # Between two states the equation is the mean of its derivatives.
        change = solve.residual - at.residual(y)
        wrong = self._contradicts(known, solve.y - y, change, solve.norms[0] + solve.norms[1])
        wrong = wrong & (self.monotone | (known.curvature == 0))
        status = PointStatus.where(wrong, PointStatus.contradicted, solve.status)
        return Solved(solve.y, solve.residual, solve.distance, zero, work, status, known.estimates)

    def _contradicts(self, known: KnownStability, e: Vector, r: Vector, size: Scalar) -> Array:
        """Whether `r = F_y e`, in the dual norm at most `size`, shows that a given stability is too
        large: `|e|_R` is at least `e'r / |r|_{R^-1}`, and at most `|r|_{R^-1} / c`."""
        if self.stability is None:
            return jnp.array(False)
        return known.stability * jnp.abs(jnp.dot(e, r)) > CONTRADICTED * size**2

    def solve_linear(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        b: Vector,
        tolerance: Scalar,
        relative: ArrayLike = 0.0,
        exact: bool = True,
    ) -> LinearResult:
        """Solve with F_y at y, to a tolerance or to a residual of `relative` times b. Without
        `exact` the residual may be that of a recurrence, which takes less."""
        operator = jax.linearize(at.residual, y)[1]
        c, inverse = known.stability, self.inverse(at)
        return self.adjoint_solver(
            operator,
            b,
            tolerance=tolerance,
            relative=relative,
            lower_bound=c,
            preconditioner=inverse,
            **self._last_look(exact),
        )

    def _last_look(self, exact: bool) -> dict[str, bool]:
        return {} if exact or not isinstance(self.adjoint_solver, MINRES) else NO_LAST_LOOK

    def linear_work(self, products: ArrayLike) -> Work:
        """What the two linear solves of a Hessian product cost."""
        # One more use of the preconditioner than of F_y begins each.
        return self.work(products, solves=2 if isinstance(self.adjoint_solver, MINRES) else 0)

    def solve_transpose(
        self,
        at: Fixed,
        known: KnownStability,
        y: Vector,
        b: Vector,
        tolerance: Scalar,
        relative: ArrayLike = 0.0,
        guess: Vector | None = None,
        exact: bool = True,
    ) -> LinearResult:
        """Solve with the transpose of F_y at y, likewise."""
        pullback = jax.vjp(at.residual, y)[1]
        return self.adjoint_solver(
            lambda w: pullback(w)[0],
            b,
            tolerance=tolerance,
            relative=relative,
            lower_bound=known.stability,
            guess=guess,
            preconditioner=self.inverse(at),
            **self._last_look(exact),
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
        solve = self.solve_transpose(at, known, y, b, tolerance, guess=guess)
        status = PointStatus.where(solve.converged, PointStatus.ok, PointStatus.inaccurate)
        error = dual_size(solve.residual, self.inverse(at)) / known.stability
        r = b - solve.residual
        wrong = self._contradicts(known, solve.x, r, dual_size(r, self.inverse(at)))
        status = PointStatus.where(wrong, PointStatus.contradicted, status)
        zero = jnp.zeros((), y.dtype)
        work = self.work(solve.products, solves=1)
        return Solved(solve.x, solve.residual, error, zero, work, status, {})

    def least_value(
        self, at: Fixed, known: KnownStability, error: Scalar, j: Scalar, g_y: Vector
    ) -> Scalar:
        """About the least value at a state so far away, to first order, without an adjoint."""
        del known
        return j - dual_size(g_y, self.inverse(at)) * error

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
        inverse = self.inverse(at)
        y, q, t = state.vector, adjoint.vector, state.error
        s = dual_size(adjoint.residual, inverse)
        # |q|_R is at most |F_y' q|_{R^-1} / c.
        q_norm = jnp.linalg.norm(q)
        if inverse is not None:
            q_norm = dual_size(g_y - adjoint.residual, inverse) / known.stability
        products = 0
        if self.cross is None:
            dual = (lambda r: r) if inverse is None else inverse
            cross, products = estimate_cross_in(at, dual, y, q, q_norm)
        else:
            cross: CrossBounds = constant(self.cross, at.unravel(y), at.unravel(q), at.x)
        bend = known.smoothness + known.curvature * q_norm
        value = s * t + 0.5 * bend * t * t
        factor = (cross.adjoint + cross.both * t) / known.stability
        errors = Errors(
            value,
            cross.state * t + factor * bend * t,
            factor * s,
            cross.state + cross.adjoint * bend / known.stability,
            cross.adjoint,
        )
        corrected = j - jnp.dot(q, state.residual)
        return corrected, errors, dict(state.estimates), self.work(products, solves=3)


def _wave(y: Vector) -> Vector:
    """A fixed vector with components along every direction."""
    return jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype))
