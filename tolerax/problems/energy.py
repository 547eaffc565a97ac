"""State and adjoint solves for lower levels that minimize a strongly convex function."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from tolerax.contracts import Provenance, Work
from tolerax.inner.bounds import dual_norm
from tolerax.inner.estimates import smallest_eigenvalue
from tolerax.inner.krylov import CG, LinearResult
from tolerax.inner.minimizers import NO_LIMIT, Limit, Minimizer, Smooth
from tolerax.inner.recycled import Recycled, blank_factor
from tolerax.problems.constants import check_constant, constant, origin
from tolerax.problems.implicit import Fixed, Solved
from tolerax.problems.norms import SAFETY, Errors, energy_errors, estimate_cross
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]
LANCZOS_STEPS = 12
NOT_NEGATIVE = ("self_concordance", "upper_smoothness", "relative_smoothness")
PAIRS = 16  # directions of a linear solve that the next ones learn from


class Known(eqx.Module):
    """The constants at one x: bound D on the Hessian, self-concordance M, estimates; and what
    linear solves have learned, if they do."""

    lower_bound: Vector
    self_concordance: Scalar
    estimates: dict[str, Array]
    work: Work
    memory: Recycled | None = None
    possible: Array | bool = True  # no such constant is negative, zero or NaN where it must not be


class Minimization(eqx.Module):
    """What both norms share: the constants, the lower-level solve, the adjoint solve."""

    strong_convexity: Any
    self_concordance: Any
    upper_smoothness: Any
    cross: Any
    state_solver: Minimizer
    adjoint_solver: CG
    preconditioner: Any = None
    self_concordance_along: Any = None
    relative_smoothness: Any = None
    recycle: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        for name in ("strong_convexity", *NOT_NEGATIVE):
            check_constant(name, getattr(self, name), positive=name == "strong_convexity")

    @property
    def provenance(self) -> Provenance:
        """Which constants are given, proved or estimated."""
        names = ["strong_convexity", "self_concordance", "upper_smoothness", "cross"]
        if self.self_concordance_along is not None:
            names.insert(2, "self_concordance_along")
        return Provenance(tuple((name, origin(getattr(self, name))) for name in names))

    @property
    def estimates_smoothness(self) -> bool:
        """Whether nothing is known of how smooth the upper level is."""
        return self.upper_smoothness is None

    def first_estimates(self, y: Vector) -> dict[str, Array]:
        """The part of the carry that holds estimates: empty when every constant is known."""
        zero = jnp.zeros((), y.dtype)
        estimates = {}
        if self.strong_convexity is None:
            # A fixed start vector with components along every direction.
            wave = jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype))
            estimates |= {"softest": wave, "least": jnp.full((), jnp.inf, y.dtype)}
        if self.self_concordance is None:
            estimates |= {"self_concordance": zero}
        if self.estimates_smoothness:
            estimates |= {"smoothness": zero}
        if self.recycle:
            estimates |= {"recycled": blank_factor(y, self.recycle)}
        return estimates

    def constants(self, at: Fixed, carry: Any) -> Known:
        """The constants at x, measured where they are neither given nor proved."""
        y, estimates, products = carry.y, dict(carry.estimates), 0
        operator = None
        if self.strong_convexity is None or self.self_concordance is None:
            operator = jax.linearize(at.residual, y)[1]
        if self.strong_convexity is None:
            assert operator is not None
            value, vector = smallest_eigenvalue(operator, estimates["softest"], LANCZOS_STEPS)
            # A little of every direction keeps later calls from missing a new softest one.
            wave = jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype))
            mixed = vector + 1e-2 * wave / jnp.linalg.norm(wave)
            estimates["softest"] = mixed
            tiny = jnp.finfo(y.dtype).tiny
            value = jnp.minimum(value, estimates["least"])
            lower_bound = jnp.full_like(y, jnp.maximum(0.5 * value, tiny))
            products += min(LANCZOS_STEPS, y.size)
        else:
            mu = constant(self.strong_convexity, at.x)
            flat = ravel_pytree(mu)[0].astype(y.dtype)
            lower_bound = jnp.broadcast_to(flat, y.shape)
        if self.self_concordance is None:
            assert operator is not None
            m, r = estimates["self_concordance"], at.residual(y)
            probe = jax.jvp(lambda y: jax.jvp(at.residual, (y,), (r,))[1], (y,), (r,))[1]
            size = jnp.linalg.norm(r) * jnp.dot(r, operator(r))
            seen = jnp.abs(jnp.dot(probe, r)) / jnp.maximum(size, jnp.finfo(y.dtype).tiny)
            m = jnp.maximum(m, jnp.where(jnp.isfinite(seen), seen, 0))
            estimates["self_concordance"] = m
            products += 3
            self_concordance = SAFETY * m
        else:
            self_concordance = at.constant(self.self_concordance).astype(y.dtype)
        possible = jnp.all(lower_bound > 0) & (self_concordance >= 0)
        lower_bound = jnp.where(lower_bound > 0, lower_bound, 1)
        memory = None
        if self.recycle:
            memory = Recycled.of(lower_bound, estimates["recycled"], pairs=PAIRS)
        work = Work(hessian_products=products)
        return Known(lower_bound, self_concordance, estimates, work, memory, possible)

    def smooth(self, at: Fixed, known: Known) -> Smooth:
        """The lower level as a function of the flat y."""
        resembling = None
        if self.preconditioner is not None:
            resembling = lambda y: _flat_preconditioner(self.preconditioner, at, y)  # noqa: E731
        along = None
        if self.self_concordance_along is not None:
            along = lambda v: constant(self.self_concordance_along, at.unravel(v), at.x)  # noqa: E731
        return Smooth(
            at.potential, known.lower_bound, known.self_concordance, resembling, along, known.memory
        )

    def contradiction(
        self, curvature: Scalar, known: Known, third: ArrayLike = 0.0, bent: ArrayLike = 0.0
    ) -> Array:
        """Whether curvature seen along the way contradicts a constant that is not an estimate."""
        wrong = ~jnp.asarray(known.possible)
        if self.strong_convexity is not None:
            wrong = wrong | (curvature < 0.99)
        if self.self_concordance is not None:
            wrong = wrong | (third > 1.1 * known.self_concordance + 1e-6)
        if self.self_concordance_along is not None:
            wrong = wrong | ((jnp.asarray(bent) > 1.1) & (jnp.asarray(third) > 1e-6))
        return wrong

    def correction(self, curvature: Scalar, known: Known) -> tuple[Scalar, dict[str, Array]]:
        """What errors have to be multiplied by when an estimate of the strong convexity turned out
        too large on the way (they go with its inverse root), and the curvature to begin with next
        time."""
        if self.strong_convexity is not None:
            return jnp.ones_like(curvature), {}
        share = jnp.clip(curvature, 1e-6, 1.0)
        least = share * jnp.min(known.lower_bound)
        forget = jnp.maximum(1.2 * known.estimates["least"], least)
        return 1 / jnp.sqrt(share), {"least": jnp.where(curvature < 0.99, least, forget)}

    def solve_transpose(
        self,
        at: Fixed,
        known: Known,
        y: Vector,
        b: Vector,
        tolerance: Scalar,
        relative: ArrayLike = 0.0,
        exact: bool = True,
    ) -> LinearResult:
        """Solve with the (symmetric) lower-level Hessian at y, to a tolerance or to `relative`
        times the size of the solution."""
        del exact
        return self._linear(at, known, y, b, tolerance, None, relative)

    def linear_work(self, products: ArrayLike) -> Work:
        """What linear solves of so many products cost."""
        return Work(hessian_products=products, linear_iterations=products)

    solve_linear = solve_transpose

    def _linear(
        self,
        at: Fixed,
        known: Known,
        y: Vector,
        b: Vector,
        tolerance: Scalar,
        guess: Vector | None,
        relative: ArrayLike = 0.0,
    ) -> LinearResult:
        lower = self.smooth(at, known)
        return self.adjoint_solver(
            lower.hessian(y),
            b,
            lower_bound=known.lower_bound,
            tolerance=tolerance,
            relative=relative,
            guess=guess,
            preconditioner=lower.resembling(y),
            memory=known.memory,
        )

    def _adjoint(
        self, at: Fixed, known: Known, y: Vector, b: Vector, guess: Vector, tolerance: Scalar
    ) -> tuple[LinearResult, Solved]:
        solve = self._linear(at, known, y, b, tolerance, guess)
        wrong = self.contradiction(solve.curvature, known)
        # A solve that ends before its limit without an answer has met rounding.
        floored = (solve.iterations < self.adjoint_solver.max_steps) & jnp.isfinite(solve.error)
        factor, seen = self.correction(solve.curvature, known)
        status = PointStatus.where(floored, PointStatus.floor, PointStatus.inaccurate)
        status = PointStatus.where(solve.converged, PointStatus.ok, status)
        status = PointStatus.where(factor > 1, PointStatus.inaccurate, status)
        status = PointStatus.where(wrong, PointStatus.contradicted, status)
        work = Work(hessian_products=solve.products, linear_iterations=solve.iterations)
        zero, error = jnp.zeros((), y.dtype), factor * solve.error
        if solve.memory is not None:
            seen = {**seen, "recycled": solve.memory.factor}
        return solve, Solved(solve.x, solve.residual, error, zero, work, status, seen)

    def _state(self, at: Fixed, known: Known, y: Vector, tolerance: Scalar, limit: Limit) -> Solved:
        solve = self.state_solver(self.smooth(at, known), y, tolerance, limit)
        wrong = self.contradiction(solve.curvature, known, solve.third, solve.bent)
        factor, seen = self.correction(solve.curvature, known)
        missed = (solve.status == PointStatus.ok) & (factor > 1)
        status = PointStatus.where(missed, PointStatus.inaccurate, solve.status)
        status = PointStatus.where(wrong, PointStatus.contradicted, status)
        work = known.work + Work(
            lower_gradients=solve.gradients,
            hessian_products=solve.products,
            linear_iterations=solve.products,
        )
        estimates = dict(known.estimates)
        if self.self_concordance is None:
            m = estimates["self_concordance"]
            estimates["self_concordance"] = jnp.maximum(m, solve.third)
        estimates |= seen
        return Solved(
            solve.y,
            solve.residual,
            factor * solve.distance,
            factor * factor * solve.exponent,
            work,
            status,
            estimates,
            solve.rounding,
            solve.memory,
        )

    @abc.abstractmethod
    def solve_state(
        self,
        at: Fixed,
        known: Known,
        y: Vector,
        tolerance: Scalar,
        limit: Limit = NO_LIMIT,
    ) -> Solved:
        """Solve for the state from the guess y until its error is at most the tolerance, or until
        the limit."""

    @abc.abstractmethod
    def solve_adjoint(
        self, at: Fixed, known: Known, y: Vector, b: Vector, guess: Vector, tolerance: Scalar
    ) -> Solved:
        """Solve `F_y' q = b` at y from a guess until the error is at most the tolerance."""

    @abc.abstractmethod
    def least_value(self, at: Fixed, known: Known, error: Scalar, j: Scalar, g_y: Vector) -> Scalar:
        """About the least value that J can have at a state so far away, to first order, without an
        adjoint: it decides whether more work is worth it, never what is claimed."""

    @abc.abstractmethod
    def errors(
        self, at: Fixed, known: Known, state: Solved, adjoint: Solved, j: Scalar, g_y: Vector
    ) -> tuple[Scalar, Errors, dict[str, Array], Work]:
        """The value, bounds on the errors, the estimates to carry on and the work they took."""


class Energy(Minimization):
    """Errors in the energy norm of the lower-level Hessian H: `|e|_H^2 = e'He`.

    `Accuracy.state` bounds `|y - y*|_H`, `Accuracy.adjoint` bounds `|q - H^-1 grad_y J|_H`. The
    bounds stay within a modest factor of the true errors where Euclidean ones, divided by the
    smallest eigenvalue, certify nothing.
    """

    @property
    def provenance(self) -> Provenance:
        """Which constants are given, proved or estimated."""
        constants = dict(super().provenance.constants)
        if self.relative_smoothness is not None:
            if self.upper_smoothness is None:
                del constants["upper_smoothness"]
            constants["relative_smoothness"] = origin(self.relative_smoothness)
        return Provenance(tuple(constants.items()))

    @property
    def estimates_smoothness(self) -> bool:
        return self.upper_smoothness is None and self.relative_smoothness is None

    def solve_state(
        self,
        at: Fixed,
        known: Known,
        y: Vector,
        tolerance: Scalar,
        limit: Limit = NO_LIMIT,
    ) -> Solved:
        # Bounds grow like exp(M |y - y*|): where that exceeds 1 they say nothing, and Newton's
        # method, which converges quadratically from about there, gets below it almost for free.
        root = jnp.sqrt(jnp.min(known.lower_bound))
        useful = root / jnp.maximum(known.self_concordance, jnp.finfo(y.dtype).tiny * root)
        solved = self._state(at, known, y, jnp.minimum(tolerance, useful), limit)
        enough = (solved.error <= tolerance) & (
            (solved.status == PointStatus.inaccurate) | (solved.status == PointStatus.floor)
        )
        status = PointStatus.where(enough, PointStatus.ok, solved.status)
        return eqx.tree_at(lambda s: s.status, solved, status)

    def solve_adjoint(
        self, at: Fixed, known: Known, y: Vector, b: Vector, guess: Vector, tolerance: Scalar
    ) -> Solved:
        return self._adjoint(at, known, y, b, guess, tolerance)[1]

    def least_value(self, at: Fixed, known: Known, error: Scalar, j: Scalar, g_y: Vector) -> Scalar:
        del at
        return j - dual_norm(g_y, known.lower_bound) * error

    def errors(
        self, at: Fixed, known: Known, state: Solved, adjoint: Solved, j: Scalar, g_y: Vector
    ) -> tuple[Scalar, Errors, dict[str, Array], Work]:
        y, q, r = state.vector, adjoint.vector, state.residual
        hq = g_y - adjoint.residual
        qhq = jnp.maximum(jnp.dot(q, hq), 0)
        tiny = jnp.finfo(y.dtype).tiny
        estimates, products = merged(state.estimates, adjoint.estimates), 0
        smoothness = jnp.full((), jnp.inf, y.dtype)
        allowed = jnp.full((), jnp.inf, y.dtype)  # for q'J_yy q
        if self.relative_smoothness is not None:
            smoothness = at.constant(self.relative_smoothness).astype(y.dtype)
            allowed = smoothness * qhq
        if self.upper_smoothness is not None:
            by_norm = at.constant(self.upper_smoothness)
            smoothness = jnp.minimum(smoothness, by_norm / jnp.min(known.lower_bound))
            allowed = jnp.minimum(allowed, by_norm * jnp.dot(q, q))
        contradicted, bent = jnp.array(False), jnp.zeros((), y.dtype)
        given = "given" in (origin(self.upper_smoothness), origin(self.relative_smoothness))
        if given or "smoothness" in estimates:
            # q = H^-1 grad J is close to a power step for the relative curvature of J.
            gq = jax.jvp(jax.grad(at.cost), (y,), (q,))[1]
            bent = jnp.abs(jnp.dot(q, gq))
            noise = 1e3 * jnp.finfo(y.dtype).eps * jnp.linalg.norm(q) * jnp.linalg.norm(gq)
            contradicted = ~(bent <= 1.01 * allowed + noise)
            products += 1
        if "smoothness" in estimates:
            seen = bent / jnp.maximum(qhq, tiny)
            smoothness = jnp.maximum(seen, 0.5 * estimates["smoothness"])
            estimates["smoothness"] = smoothness
            smoothness = SAFETY * smoothness
        if self.cross is None:
            cross, cost = estimate_cross(at, known.lower_bound, y, q)
            products += cost
        else:
            cross = constant(self.cross, at.unravel(y), at.unravel(q), at.x)
        errors = energy_errors(
            distance=state.error,
            exponent=state.exponent,
            adjoint_error=adjoint.error,
            q_norm=jnp.sqrt(qhq),
            q_bend=self.smooth(at, known).bend(q),
            smoothness=smoothness,
            cross=cross,
        )
        # Rounding of r in q'r, and of the gradient, a sum of products that may cancel.
        q_norm, eps = jnp.sqrt(qhq), jnp.finfo(y.dtype).eps
        errors = Errors(
            errors.value + q_norm * state.rounding,
            errors.from_state,
            errors.from_adjoint + 8 * eps * cross.adjoint * q_norm,
            errors.per_state,
            errors.per_adjoint,
            contradicted,
            None if self.cross is None else q_norm,
        )
        return j - jnp.dot(q, r), errors, estimates, Work(hessian_products=products)


def merged(state: dict[str, Array], adjoint: dict[str, Array]) -> dict[str, Array]:
    """The estimates of both solves: of two curvatures the smaller one, of two memories the last."""
    smaller = {name: jnp.minimum(state[name], adjoint[name]) for name in adjoint.keys() & {"least"}}
    return state | adjoint | smaller


def _flat_preconditioner(hook: Callable, at: Fixed, y: Vector) -> Vector | Callable:
    """What the user's function returns at y on flat vectors: a diagonal P, or `r -> P^-1 r`."""
    tree = at.unravel(y)
    shape = lambda leaf: getattr(leaf, "shape", ())  # noqa: E731
    shapes = jax.tree.map(shape, tree)

    def flat(answer: Any, what: str) -> Vector:
        if callable(answer) or jax.tree.map(shape, answer) != shapes:
            raise TypeError(
                f"{what} returned {answer!r}: return a pytree like y, with shapes {shapes}, that "
                "holds the diagonal, or an operator whose `mv(r)` takes and returns such a pytree."
            )
        return ravel_pytree(answer)[0].astype(y.dtype)

    resembling = hook(tree, at.x)
    if hasattr(resembling, "mv"):
        return lambda r: flat(resembling.mv(at.unravel(r)), "mv of the preconditioner")
    return flat(resembling, "preconditioner")
