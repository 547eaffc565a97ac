"""Restarted GMRES for general systems, in the inner product of its preconditioner or flexible."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from tolerax.inner.krylov import LinearResult
from tolerax.inner.metric import definite_norm

Vector = Float[Array, " n"]
Operator = Callable[[Vector], Vector]


class GMRES(eqx.Module):
    """Restarted GMRES for general A, in the inner product of a positive definite preconditioner P.

    The norm that falls in every step is `|r|_{P^-1}`, as it is in [`MINRES`][]: with `lower_bound`
    c <= the least `|A e|_{P^-1} / |e|_P` the error `|x - x*|_P` is at most `|r|_{P^-1} / c`. With
    no preconditioner these are Euclidean norms and c <= sigma_min(A). The default c = 1 makes the
    tolerance one on the residual itself.

    - `restart`: Krylov dimension. `max_steps`: the most iterations, of one product each.

    Source: Saad and Schultz (*SIAM J. Sci. Stat. Comput.* 7, 1986); inner products that fit the
    problem: Starke (*Numer. Math.* 78, 1997).

    >>> import jax.numpy as jnp
    >>> A = jnp.array([[2.0, 1.0], [0.0, -3.0]])
    >>> solve = GMRES()(lambda v: A @ v, jnp.ones(2), tolerance=1e-10)
    >>> bool(solve.converged), int(solve.iterations)
    (True, 2)
    """

    restart: int = eqx.field(static=True, default=30)
    max_steps: int = 1000

    def __check_init__(self):
        if self.restart < 1:
            raise ValueError(f"restart is {self.restart}: give at least 1.")

    @property
    def _flexible(self) -> bool:
        return False

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

        - `preconditioner`: callable `r -> P^-1 r`, linear, symmetric and positive definite. Where
          it is seen not to be, the solve ends with an infinite error.
        """
        dtype, count = b.dtype, jnp.result_type(int)
        inverse = (lambda v: v) if preconditioner is None else preconditioner
        m, tiny, eps = self.restart, jnp.finfo(dtype).tiny, jnp.finfo(dtype).eps
        c = jnp.min(jnp.asarray(lower_bound, dtype))

        def size(r: Vector) -> tuple[Array, Vector]:
            """The norm of r, and P^-1 applied to r over its norm."""
            if self._flexible:
                norm = jnp.linalg.norm(r)
                return norm, inverse(r / jnp.maximum(norm, tiny))
            z = inverse(r)
            norm = definite_norm(r, z)
            return norm, z / jnp.maximum(norm, tiny)

        x0 = jnp.zeros_like(b) if guess is None else guess
        r0 = b if guess is None else b - operator(guess)
        first, z0 = size(r0)
        wanted = c * jnp.maximum(jnp.asarray(tolerance, dtype), relative * first / c)

        def growing(state: tuple) -> Bool[Array, ""]:
            _, _, _, g, j, steps, closed, lost = state
            going = (jnp.abs(g[j]) > wanted) & (j < m) & (steps < self.max_steps)
            return going & ~closed & ~lost

        def grow(state: tuple) -> tuple:
            basis, zs, (h, cos, sin), g, j, steps, _, _ = state
            w = operator(zs[j])
            # Products with the duals of the basis; rows that are not there yet are zero.
            duals = basis if self._flexible else zs
            before = jnp.linalg.norm(w)
            column = duals @ w
            w = w - basis.T @ column
            again = duals @ w
            w, column = w - basis.T @ again, column + again
            norm, z = size(w)
            closed = ~(jnp.linalg.norm(w) > 10 * eps * before)
            lost = ~closed & (norm == jnp.inf)
            column = column.at[j + 1].set(norm)

            def rotate(i: Array, column: Vector) -> Vector:
                turned = cos[i] * column[i] + sin[i] * column[i + 1]
                other = cos[i] * column[i + 1] - sin[i] * column[i]
                return jnp.where(i >= j, column, column.at[i].set(turned).at[i + 1].set(other))

            column = jax.lax.fori_loop(0, m, rotate, column)
            rho = jnp.maximum(jnp.hypot(column[j], norm), tiny)
            cos, sin = cos.at[j].set(column[j] / rho), sin.at[j].set(norm / rho)
            h = h.at[:, j].set(column.at[j].set(rho).at[j + 1].set(0)[:m])
            g = g.at[j + 1].set(-sin[j] * g[j]).at[j].set(cos[j] * g[j])
            unit = jnp.where(closed, 0, w / jnp.maximum(norm, tiny))
            basis, zs = basis.at[j + 1].set(unit), zs.at[j + 1].set(jnp.where(closed, 0, z))
            return basis, zs, (h, cos, sin), g, j + 1, steps + 1, closed, lost

        def cycle(state: tuple) -> tuple:
            x, r, z, norm, steps, cycles, _ = state
            rows = jnp.zeros((m + 1, b.size), dtype)
            basis = rows.at[0].set(r / jnp.maximum(norm, tiny))
            rotations = (jnp.eye(m, dtype=dtype), jnp.ones(m, dtype), jnp.zeros(m, dtype))
            g = jnp.zeros(m + 1, dtype).at[0].set(norm)
            begin = (
                basis,
                rows.at[0].set(z),
                rotations,
                g,
                jnp.array(0, count),
                steps,
                false,
                false,
            )
            _, zs, (h, _, _), g, j, steps, _, lost = jax.lax.while_loop(growing, grow, begin)
            used = jnp.where(jnp.arange(m) < j, g[:m], 0)
            x_new = x + zs[:m].T @ jax.scipy.linalg.solve_triangular(h, used)
            r_new = b - operator(x_new)
            norm_new, z_new = size(r_new)
            norm_new = jnp.where(lost, jnp.inf, norm_new)
            better = norm_new < norm
            stuck = ~(norm_new < 0.999 * norm)
            # Where a product is not finite, or P not positive definite, nothing is known.
            kept = jnp.where(jnp.isfinite(norm_new), norm, jnp.inf)
            x, r, z = (
                jnp.where(better, new, old) for new, old in ((x_new, x), (r_new, r), (z_new, z))
            )
            return x, r, z, jnp.where(better, norm_new, kept), steps, cycles + 1, stuck

        def unfinished(state: tuple) -> Bool[Array, ""]:
            _, _, _, norm, steps, _, stuck = state
            return (norm > wanted) & (steps < self.max_steps) & ~stuck & jnp.isfinite(norm)

        false, zero = jnp.array(False), jnp.array(0, count)
        begin = (x0, r0, z0, first, zero, zero, false)
        x, r, _, norm, steps, cycles, _ = jax.lax.while_loop(unfinished, cycle, begin)
        more = steps + cycles + (guess is not None)
        return LinearResult.by_residual(x, r, norm, first, wanted, c, steps, more)


class FGMRES(GMRES):
    """Flexible, restarted GMRES: general A, a right preconditioner of any kind, which may change
    from step to step.

    With `lower_bound` c <= sigma_min(A) the Euclidean error is at most `|r| / c`; the default c = 1
    makes the tolerance one on the residual.

    - `restart`: Krylov dimension. `max_steps`: the most iterations, of one product each.

    Source: Saad (*SIAM J. Sci. Comput.* 14, 1993).

    >>> import jax.numpy as jnp
    >>> A = jnp.array([[2.0, 1.0], [0.0, -3.0]])
    >>> crooked = lambda r: r / (1 + jnp.abs(r))
    >>> solve = FGMRES()(lambda v: A @ v, jnp.ones(2), tolerance=1e-8, preconditioner=crooked)
    >>> bool(solve.converged)
    True
    """

    @property
    def _flexible(self) -> bool:
        return True
