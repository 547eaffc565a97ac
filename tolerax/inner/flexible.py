"""Krylov methods whose preconditioner may change from step to step."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.inner.krylov import LinearResult

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


def _identity(v: Vector) -> Vector:
    return v


class FlexibleCG(eqx.Module):
    """Conjugate gradients for symmetric positive definite A with any preconditioner, also one that
    is not linear: every direction is made A-orthogonal to the last ones explicitly.

    With `lower_bound` c <= the smallest eigenvalue of A the Euclidean error is at most `|r| / c`;
    the default c = 1 makes the tolerance one on the residual.

    - `max_steps`: the most iterations, of one product each. `memory`: directions that are kept.

    Source: Notay (*SIAM J. Sci. Comput.* 22, 2000).

    >>> import jax.numpy as jnp
    >>> A = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    >>> crooked = lambda r: r / (1 + jnp.abs(r))
    >>> solve = FlexibleCG()(lambda v: A @ v, jnp.ones(3), tolerance=1e-10, preconditioner=crooked)
    >>> bool(solve.converged)
    True
    """

    max_steps: int = 1000
    memory: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}: keep at least one direction.")

    def __call__(
        self,
        operator: Operator,
        b: Vector,
        *,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        lower_bound: ArrayLike = 1.0,
        guess: Vector | None = None,
        preconditioner: Operator | None = None,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `preconditioner`: callable that resembles `A^-1`.
        """
        dtype, count = b.dtype, jnp.result_type(int)
        precondition = preconditioner or _identity
        c = jnp.min(jnp.asarray(lower_bound, dtype))
        x0 = jnp.zeros_like(b) if guess is None else guess
        r0 = b if guess is None else b - operator(guess)
        first = jnp.linalg.norm(r0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)
        tiny = jnp.finfo(dtype).tiny

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, r, *_, step, broken = state
            return (jnp.linalg.norm(r) > wanted) & (step < self.max_steps) & ~broken

        def body(state: tuple) -> tuple:
            x, r, p, ap, pap, curvature, step, _ = state
            z = precondition(r)
            # A preconditioner that turns away from the residual is replaced by none.
            z = jnp.where(jnp.dot(z, r) > 0, z, r)
            z = z - p.T @ jnp.where(pap > 0, (ap @ z) / jnp.where(pap > 0, pap, 1), 0)
            az = operator(z)
            zaz = jnp.dot(z, az)
            broken = ~(zaz > 0) | ~jnp.isfinite(zaz)
            alpha = jnp.where(broken, 0, jnp.dot(z, r) / jnp.where(broken, 1, zaz))
            row = step % self.memory
            curvature = jnp.minimum(curvature, zaz / jnp.maximum(jnp.dot(z, z), tiny))
            return (
                x + alpha * z,
                r - alpha * az,
                p.at[row].set(z),
                ap.at[row].set(az),
                pap.at[row].set(zaz),
                curvature,
                step + 1,
                broken,
            )

        rows = jnp.zeros((self.memory, b.size), dtype)
        none, inf = jnp.zeros(self.memory, dtype), jnp.array(jnp.inf, dtype)
        begin = (x0, r0, rows, rows, none, inf, jnp.array(0, count), ~jnp.isfinite(first))
        x, _, _, _, _, curvature, steps, _ = jax.lax.while_loop(unfinished, body, begin)
        residual = b - operator(x)
        more = steps + 1 + (guess is not None)
        norm = jnp.linalg.norm(residual)
        return _result(x, residual, norm, c, first, wanted, steps, more, curvature / c)


class FGMRES(eqx.Module):
    """Flexible, restarted GMRES: general A, right preconditioner of any kind.

    With `lower_bound` c <= sigma_min(A) the Euclidean error is at most `|r| / c`; the default c = 1
    makes the tolerance one on the residual.

    - `restart`: Krylov dimension. `max_steps`: the most iterations, of one product each.

    Source: Saad (*SIAM J. Sci. Comput.* 14, 1993).

    >>> import jax.numpy as jnp
    >>> A = jnp.array([[2.0, 1.0], [0.0, -3.0]])
    >>> solve = FGMRES()(lambda v: A @ v, jnp.ones(2), tolerance=1e-10)
    >>> bool(solve.converged), int(solve.iterations)
    (True, 2)
    """

    restart: int = eqx.field(static=True, default=30)
    max_steps: int = 1000

    def __check_init__(self):
        if self.restart < 1:
            raise ValueError(f"restart is {self.restart}: give at least 1.")

    def __call__(
        self,
        operator: Operator,
        b: Vector,
        *,
        tolerance: ArrayLike,
        relative: ArrayLike = 0.0,
        lower_bound: ArrayLike = 1.0,
        guess: Vector | None = None,
        preconditioner: Operator | None = None,
    ) -> LinearResult:
        """Solve until the error is at most `tolerance`, or `relative` times that of the guess.

        - `preconditioner`: callable that resembles `A^-1`.
        """
        dtype, count = b.dtype, jnp.result_type(int)
        precondition = preconditioner or _identity
        m, tiny = self.restart, jnp.finfo(dtype).tiny
        c = jnp.min(jnp.asarray(lower_bound, dtype))
        x0 = jnp.zeros_like(b) if guess is None else guess
        r0 = b if guess is None else b - operator(guess)
        first = jnp.linalg.norm(r0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)

        def growing(state: tuple) -> Bool[Array, ""]:
            _, _, _, g, j, steps, closed = state
            left = jnp.abs(g[j]) > wanted
            return left & (j < m) & (steps < self.max_steps) & ~closed

        def grow(state: tuple) -> tuple:
            basis, zs, (h, cos, sin), g, j, steps, _ = state
            z = precondition(basis[j])
            w = operator(z)
            size = jnp.linalg.norm(w)
            # Twice is enough: rows of the basis that are not there yet are zero.
            column = basis @ w
            w = w - basis.T @ column
            again = basis @ w
            w, column = w - basis.T @ again, column + again
            norm = jnp.linalg.norm(w)
            closed = ~(norm > 10 * jnp.finfo(dtype).eps * size)
            column = column.at[j + 1].set(norm)

            def rotate(i: Array, column: Vector) -> Vector:
                turned = cos[i] * column[i] + sin[i] * column[i + 1]
                other = cos[i] * column[i + 1] - sin[i] * column[i]
                done = i >= j
                return jnp.where(done, column, column.at[i].set(turned).at[i + 1].set(other))

            column = jax.lax.fori_loop(0, m, rotate, column)
            rho = jnp.maximum(jnp.hypot(column[j], norm), tiny)
            cos, sin = cos.at[j].set(column[j] / rho), sin.at[j].set(norm / rho)
            h = h.at[:, j].set(column.at[j].set(rho).at[j + 1].set(0)[:m])
            g = g.at[j + 1].set(-sin[j] * g[j]).at[j].set(cos[j] * g[j])
            basis = basis.at[j + 1].set(jnp.where(closed, 0, w / jnp.maximum(norm, tiny)))
            return basis, zs.at[j].set(z), (h, cos, sin), g, j + 1, steps + 1, closed

        def cycle(state: tuple) -> tuple:
            x, r, norm, steps, cycles, _ = state
            basis = jnp.zeros((m + 1, b.size), dtype).at[0].set(r / jnp.maximum(norm, tiny))
            rotations = (jnp.eye(m, dtype=dtype), jnp.ones(m, dtype), jnp.zeros(m, dtype))
            g = jnp.zeros(m + 1, dtype).at[0].set(norm)
            zero = jnp.array(0, count)
            zs = jnp.zeros((m, b.size), dtype)
            begin = (basis, zs, rotations, g, zero, steps, jnp.array(False))
            _, zs, (h, _, _), g, j, steps, _ = jax.lax.while_loop(growing, grow, begin)
            used = jnp.arange(m) < j
            coefficients = jax.scipy.linalg.solve_triangular(h, jnp.where(used, g[:m], 0))
            x_new = x + zs.T @ coefficients
            r_new = b - operator(x_new)
            norm_new = jnp.linalg.norm(r_new)
            better = norm_new < norm
            x, r = jnp.where(better, x_new, x), jnp.where(better, r_new, r)
            stuck = ~(norm_new < 0.999 * norm)
            # Where a product is not finite nothing is known of the operator.
            kept = jnp.where(jnp.isfinite(norm_new), norm, jnp.inf)
            return x, r, jnp.where(better, norm_new, kept), steps, cycles + 1, stuck

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, _, norm, steps, _, stuck = state
            return (norm > wanted) & (steps < self.max_steps) & ~stuck & jnp.isfinite(norm)

        zero = jnp.array(0, count)
        begin = (x0, r0, first, zero, zero, jnp.array(False))
        x, r, norm, steps, cycles, _ = jax.lax.while_loop(unfinished, cycle, begin)
        more = steps + cycles + (guess is not None)
        inf = jnp.array(jnp.inf, dtype)
        return _result(x, r, norm, c, first, wanted, steps, more, inf)


def _result(
    x: Vector,
    residual: Vector,
    norm: Array,
    c: Array,
    first: Array,
    wanted: Array,
    steps: Array,
    products: Array,
    curvature: Array,
) -> LinearResult:
    norm = jnp.where(jnp.isfinite(norm), norm, jnp.inf)
    zero = jnp.zeros((), x.dtype)
    return LinearResult(
        x=x,
        residual=residual,
        error=norm / c,
        first_error=first / c,
        curvature=curvature,
        largest=zero,
        rounding=zero,
        iterations=steps,
        products=products,
        converged=norm <= 1.01 * wanted,
    )
