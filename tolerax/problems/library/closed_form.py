"""P0: a quadratic problem whose solution, value and gradient are known in closed form."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from tolerax.problems.bilevel import CrossBounds
from tolerax.problems.constants import proved
from tolerax.problems.library.base import (
    LibraryProblem,
    assemble,
    check_count,
    check_real,
    generator,
)


class LeastSquaresLower(eqx.Module):
    """½‖A₂y + A₃x − b₂‖²: its Hessian in y is H = A₂ᵀA₂, its cross derivative A₂ᵀA₃."""

    A2: Float[Array, "n d"]
    A3: Float[Array, "n d"]
    b2: Float[Array, " n"]

    def __call__(self, y: Float[Array, " d"], x: Float[Array, " d"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum((self.A2 @ y + self.A3 @ x - self.b2) ** 2)


class LeastSquaresUpper(eqx.Module):
    """½‖A₁y − b₁‖²."""

    A1: Float[Array, "n d"]
    b1: Float[Array, " n"]

    def __call__(self, y: Float[Array, " d"], x: Float[Array, " d"]) -> Float[Array, ""]:
        del x
        return 0.5 * jnp.sum((self.A1 @ y - self.b1) ** 2)


class ConstantCross(eqx.Module):
    """Bounds for a cross derivative that depends on nothing: only the adjoint error counts."""

    adjoint: Float[Array, ""]

    def __call__(self, y: Any, q: Any, x: Any) -> CrossBounds:
        del y, q, x
        zero = jnp.zeros_like(self.adjoint)
        return CrossBounds(adjoint=self.adjoint, state=zero, both=zero)


class Quadratic(LibraryProblem):
    """What [`quadratic`][] returns: the problem and its closed form y*(x) = y*(0) − Kx."""

    y_at_zero: Float[Array, " d"]
    K: Float[Array, "d d"]
    optimum: Float[Array, " d"]

    def solution(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The lower-level solution y*(x)."""
        return self.y_at_zero - self.K @ x

    def value(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """f(x) = upper(y*(x))."""
        return self.upper(self.solution(x), x)

    def gradient(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """∇f(x) = −Kᵀ∇upper(y*(x))."""
        return -self.K.T @ jax.grad(self.upper)(self.solution(x), x)


def quadratic(
    seed: int = 0,
    n: int = 1000,
    d: int = 10,
    noise: float = 0.01,
    *,
    dtype: DTypeLike = float,
    **options: Any,
) -> Quadratic:
    """½‖A₁y − b₁‖² over ½‖A₂y + A₃x − b₂‖², with everything known in closed form.

    Entries of A₁, A₂, A₃ (n × d) are uniform in [0, 1]; b₁ = A₁ŷ + e₁ and b₂ = A₂ŷ + A₃x̂ + e₂ with
    ŷ, x̂ uniform and e₁, e₂ normal of size `noise`; the start is x = 1. This is the verification
    problem of Ehrhardt & Roberts (*Analyzing inexact hypergradients for bilevel learning*, IMA J.
    Appl. Math. 2023) and of MAID (arXiv 2308.10098). `options` are passed on to
    [`tolerax.problems.Bilevel`][].

    The constants are those of dense linear algebra at construction (with A₂ = USVᵀ):
    µ = σ_min(A₂)², L_g = σ_max(A₁)², A = σ_max(A₁H^{-1/2})², and B₁ = ‖A₃ᵀA₂H^{-1/2}‖ = ‖UᵀA₃‖;
    nothing depends on y or q.

    >>> p = quadratic(n=50, d=3)
    >>> bool(jnp.linalg.norm(p.gradient(p.optimum)) < 1e-9)
    True
    """
    d = check_count("d", d, 1)
    n = check_count("n", n, d)
    noise = check_real("noise", noise, 0.0)
    rng = generator(seed, "quadratic")
    A1, A2, A3 = (rng.uniform(size=(n, d)) for _ in range(3))
    y_hat, x_hat = rng.uniform(size=d), rng.uniform(size=d)
    b1 = A1 @ y_hat + noise * rng.normal(size=n)
    b2 = A2 @ y_hat + A3 @ x_hat + noise * rng.normal(size=n)

    upper = LeastSquaresUpper(jnp.asarray(A1, dtype), jnp.asarray(b1, dtype))
    lower = LeastSquaresLower(
        jnp.asarray(A2, dtype), jnp.asarray(A3, dtype), jnp.asarray(b2, dtype)
    )
    # The closed form and the constants belong to the data as rounded to dtype.
    A1, b1, A2, A3, b2 = (
        np.asarray(a, np.float64) for a in (upper.A1, upper.b1, lower.A2, lower.A3, lower.b2)
    )
    U, s, Vt = np.linalg.svd(A2, full_matrices=False)
    K, y_at_zero = np.linalg.lstsq(A2, A3)[0], np.linalg.lstsq(A2, b2)[0]
    optimum = np.linalg.lstsq(A1 @ K, A1 @ y_at_zero - b1)[0]
    # Singular values carry a rounding error of a few eps * s[0]; a proved constant allows for it.
    margin = 100 * float(jnp.finfo(dtype).eps) * s[0]
    mu = (s[-1] - margin) ** 2
    if s[-1] <= margin:
        raise ValueError(f"A2 is singular with n={n}, d={d}: take a larger n.")
    A = (np.linalg.norm(A1 @ Vt.T / s, 2) * (1 + margin / s[-1])) ** 2
    L_g = (np.linalg.norm(A1, 2) * (1 + margin / s[0])) ** 2
    B1 = np.linalg.norm(U.T @ A3, 2) * (1 + margin / s[-1])

    levels = assemble(
        upper,
        lower,
        jnp.zeros(d, dtype),
        options,
        strong_convexity=proved(jnp.asarray(mu, dtype), because="smallest singular value of A2"),
        self_concordance=proved(0.0, because="the lower level is quadratic"),
        upper_smoothness=proved(jnp.asarray(L_g, dtype), because="largest singular value of A1"),
        relative_smoothness=proved(
            jnp.asarray(A, dtype), because="largest singular value of A1 H^-1/2"
        ),
        cross=proved(
            ConstantCross(jnp.asarray(B1, dtype)), because="the cross derivative is constant"
        ),
    )
    return Quadratic(
        **levels,
        x0=jnp.ones(d, dtype),
        description=(
            f"Quadratic, closed form: y and x in R^{d}, {n} rows, noise {noise:g}, seed {seed}. "
            "All constants proved by dense linear algebra."
        ),
        y_at_zero=jnp.asarray(y_at_zero, dtype),
        K=jnp.asarray(K, dtype),
        optimum=jnp.asarray(optimum, dtype),
    )
