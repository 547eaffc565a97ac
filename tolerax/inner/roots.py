"""Root finders that stop on a distance: `F(y) = 0` with `|F_y e| >= c |e|`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from tolerax.inner.gmres import GMRES
from tolerax.inner.krylov import CG
from tolerax.inner.metric import definite_norm
from tolerax.inner.minres import MINRES
from tolerax.status import PointStatus

Vector = Float[Array, " n"]
Scalar = Float[Array, ""]


def root_distance(r_norm: Scalar, c: Scalar, curvature: Scalar) -> Scalar:
    """Bound on the distance to the root next to y, by Newton-Kantorovich.

    - `r_norm` = |F(y)|, `c`: |F_y(y) e| >= c |e|, `curvature`: Lipschitz constant L of F_y.

    With `b = r_norm / c` and `h = L b / c <= 1/2` there is a root within
    `2 b / (1 + sqrt(1 - 2h))`; otherwise nothing is known (infinity). L = 0 gives `r_norm / c`.
    """
    b = r_norm / c
    h = curvature * b / c
    inside = h <= 0.5
    t = 2 * b / (1 + jnp.sqrt(jnp.where(inside, 1 - 2 * h, 0)))
    return jnp.where(inside, t, jnp.inf)


def dual_size(r: Vector, inverse: Callable[[Vector], Vector] | None) -> Scalar:
    """`sqrt(r' P^-1 r)`, infinite where P is seen not to be positive, or the Euclidean norm."""
    return jnp.linalg.norm(r) if inverse is None else definite_norm(r, inverse(r))


def linear_solver_for(given: Any, symmetric: bool) -> Any:
    """The linear solver that was given, or the one for systems that are symmetric or not."""
    if given is None:
        return MINRES() if symmetric else GMRES()
    if isinstance(given, CG) or not callable(given):
        raise TypeError(
            f"linear_solver is {given!r}: give one that takes any system with a preconditioner, "
            "for instance `tolerax.inner.MINRES()` (symmetric), `GMRES()` or `Direct()`."
        )
    return given


class RootResult(eqx.Module):
    """The answer of a root solve: the point, `residual` F(y), `distance` to the root, `norms` of
    the residual at the guess and at the end, work."""

    y: Vector
    residual: Vector
    distance: Scalar
    norms: tuple[Scalar, Scalar]
    evaluations: Int[Array, ""]
    products: Int[Array, ""]
    status: Any


class NewtonKrylov(eqx.Module):
    """Newton's method with a Krylov solve, backtracking on |F|, forcing terms by Eisenstat and
    Walker (*SIAM J. Sci. Comput.* 17, 1996, choice 2).

    With a preconditioner P states are measured by `|e|_P` and residuals by `|r|_{P^-1}`, otherwise
    both by Euclidean norms.

    - `linear`: [`GMRES`][], or [`MINRES`][] where F_y is symmetric; [`FGMRES`][] and [`BiCGStab`][]
      measure Euclidean residuals only. `max_steps`: the most Newton steps.

    >>> import jax.numpy as jnp
    >>> solve = NewtonKrylov()(lambda y: y + y**3 - 2, jnp.zeros(3), 1e-8, stability=1.0)
    >>> solve.y
    Array([1., 1., 1.], dtype=float64)
    """

    linear: Any = eqx.field(default_factory=GMRES)
    max_steps: int = 50

    def __call__(
        self,
        residual: Callable[[Vector], Vector],
        y: Vector,
        tolerance: ArrayLike,
        *,
        stability: ArrayLike,
        curvature: ArrayLike = 0.0,
        preconditioner: Callable[[Vector], Vector] | None = None,
        everywhere: bool = False,
    ) -> RootResult:
        """Solve from the guess y until the distance to the root is at most `tolerance`.

        - `stability`: c with `|F_y e| >= c |e|`. `curvature`: Lipschitz constant of F_y.
        - `preconditioner`: callable `r -> P^-1 r`, linear, symmetric and positive definite.
        - `everywhere`: `|F(y) - F(z)| >= c |y - z|` for all y, z: no curvature is needed.
        """
        tolerance = jnp.asarray(tolerance, y.dtype)
        stability, curvature = jnp.asarray(stability), jnp.asarray(curvature)
        count = jnp.result_type(int)

        def size(r: Vector) -> Scalar:
            return dual_size(r, preconditioner)

        def sized(r: Vector) -> tuple[Vector, Scalar]:
            return r, size(r)

        def bound(norm: Scalar) -> Scalar:
            return root_distance(norm, stability, jnp.where(everywhere, 0, curvature))

        # The norm of a residual may cost a solve, so every one is taken once.
        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, (r, norm), _, step, _, _, stuck = state
            finite = jnp.all(jnp.isfinite(r))
            return (bound(norm) > tolerance) & (step < self.max_steps) & (stuck < 2) & finite

        def newton(state: tuple) -> tuple:
            y, (r, norm), forcing, step, evaluations, products, stuck = state
            _, operator = jax.linearize(residual, y)
            # Errors in units of the residual; half of what is asked, so that this can be the last.
            solve = self.linear(
                operator,
                -r,
                tolerance=jnp.minimum(0.25 * stability * tolerance, 0.5 * norm),
                relative=forcing,
                preconditioner=preconditioner,
            )

            def shorter(trial: tuple) -> tuple:
                s, _, tries = trial
                s = jnp.where(tries > 0, 0.5 * s, s)
                return s, sized(residual(y + s * solve.x)), tries + 1

            def too_long(trial: tuple) -> Bool[Array, ""]:
                s, (_, norm_new), tries = trial
                falls = norm_new <= (1 - 1e-4 * s * (1 - forcing)) * norm
                return (tries == 0) | (~falls & (tries < 25))

            start = (jnp.ones((), y.dtype), (r, norm), jnp.array(0, count))
            s, (r_new, norm_new), tries = jax.lax.while_loop(too_long, shorter, start)
            ratio = norm_new / norm
            next_forcing = 0.9 * ratio**2
            safeguard = 0.9 * forcing**2
            next_forcing = jnp.where(
                safeguard > 0.1, jnp.maximum(next_forcing, safeguard), next_forcing
            )
            improved = ratio < 0.9
            y = jnp.where(ratio < 1, y + s * solve.x, y)
            r, norm = jnp.where(ratio < 1, r_new, r), jnp.where(ratio < 1, norm_new, norm)
            return (
                y,
                (r, norm),
                jnp.clip(next_forcing, 1e-8, 0.5),
                step + 1,
                evaluations + tries,
                products + solve.products,
                jnp.where(improved, 0, stuck + 1),
            )

        zero = jnp.array(0, count)
        begin = sized(residual(y))
        start = (y, begin, jnp.array(0.1, y.dtype), zero, zero + 1, zero, zero)
        y, (r, norm), _, _, evaluations, products, stuck = jax.lax.while_loop(
            unfinished, newton, start
        )
        distance = bound(norm)
        status = PointStatus.where(stuck >= 2, PointStatus.floor, PointStatus.inaccurate)
        status = PointStatus.where(distance <= tolerance, PointStatus.ok, status)
        finite = jnp.all(jnp.isfinite(r))
        status = PointStatus.where(finite, status, PointStatus.failed)
        return RootResult(y, r, distance, (begin[1], norm), evaluations, products, status)
