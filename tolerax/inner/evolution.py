"""A normal distribution that learns where low values are: CMA-ES, with a quadratic fitted to what
was evaluated that ranks most of its sample.

Source: Hansen (arXiv 1604.00772), for the distribution and its constants; Hansen, "A global
surrogate assisted CMA-ES" (GECCO 2019), for the ranking by a quadratic.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Points = Float[Array, "m n"]
FULL_UP_TO = 14  # dimensions: beyond, fitting all products costs more than it tells


def sample_size(n: int) -> int:
    """How many points a generation has by default: `4 + 3 ln n`."""
    return 4 + int(3 * math.log(n))


class Constants(NamedTuple):
    """Weights of the ranks and rates of learning for n dimensions."""

    weights: np.ndarray
    mass: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    length: float


def constants(n: int, size: int) -> Constants:
    """The defaults of the tutorial, table 1, with negative weights for the worse half."""
    raw = math.log((size + 1) / 2) - np.log(np.arange(1, size + 1))
    up, down = raw[raw > 0], raw[raw <= 0]
    # Numbers of Python's: those of NumPy would turn arrays in single precision into double.
    mass = float(up.sum() ** 2 / (up**2).sum())
    mass_down = float(down.sum() ** 2 / (down**2).sum())
    c_c = (4 + mass / n) / (n + 4 + 2 * mass / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mass)
    c_mu = min(1 - c_1, 2 * (0.25 + mass + 1 / mass - 2) / ((n + 2) ** 2 + mass))
    total = min(1 + c_1 / c_mu, 1 + 2 * mass_down / (mass + 2), (1 - c_1 - c_mu) / (n * c_mu))
    weights = np.where(raw > 0, raw / up.sum(), raw / -min(down.sum(), -1e-300) * total)
    c_sigma = (mass + 2) / (n + mass + 5)
    d_sigma = 1 + 2 * max(0, math.sqrt((mass - 1) / (n + 1)) - 1) + c_sigma
    length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    return Constants(weights, mass, c_sigma, d_sigma, c_c, c_1, c_mu, length)


class Evolution(eqx.Module):
    """Mean, step length and covariance, with the two paths that they learn from; `basis` and
    `axes` are eigenvectors of the covariance and roots of its eigenvalues."""

    mean: Float[Array, " n"]
    sigma: Float[Array, ""]
    C: Float[Array, "n n"]
    basis: Float[Array, "n n"]
    axes: Float[Array, " n"]
    p_sigma: Float[Array, " n"]
    p_c: Float[Array, " n"]
    generation: Int[Array, ""]

    @classmethod
    def of(cls, mean: Float[Array, " n"], sigma: Float[Array, ""]) -> "Evolution":
        """One that has learned nothing."""
        n, dtype = mean.size, mean.dtype
        eye, zero = jnp.eye(n, dtype=dtype), jnp.zeros(n, dtype)
        one = jnp.ones(n, dtype)
        return cls(mean, sigma, eye, eye, one, zero, zero, jnp.array(0))

    def sample(self, key: PRNGKeyArray, size: int) -> Points:
        """Points of the distribution."""
        z = jax.random.normal(key, (size, self.mean.size), self.mean.dtype)
        return self.mean[None] + self.sigma * (z * self.axes[None]) @ self.basis.T

    def whitened(self, x: Points) -> Points:
        """Points in coordinates in which the distribution is the standard one."""
        return ((x - self.mean[None]) / self.sigma) @ self.basis / self.axes[None]

    def coloured(self, z: Points) -> Points:
        """And back."""
        return self.mean[None] + self.sigma * (z * self.axes[None]) @ self.basis.T

    def updated(self, x: Points, values: Float[Array, " m"]) -> "Evolution":
        """After a sample with these values, of which only the order counts."""
        n = self.mean.size
        k = constants(n, x.shape[0])
        order = jnp.argsort(values)
        w = jnp.asarray(k.weights, x.dtype)
        y = (x[order] - self.mean[None]) / self.sigma
        z = y @ self.basis / self.axes[None]
        parents = jnp.maximum(w, 0)
        move, direction = parents @ y, parents @ z
        p_sigma = (1 - k.c_sigma) * self.p_sigma
        p_sigma += math.sqrt(k.c_sigma * (2 - k.c_sigma) * k.mass) * (self.basis @ direction)
        norm = jnp.linalg.norm(p_sigma)
        gain = 1 - (1 - k.c_sigma) ** (2.0 * (self.generation + 1))
        steady = norm / jnp.sqrt(gain) < (1.4 + 2 / (n + 1)) * k.length
        p_c = (1 - k.c_c) * self.p_c
        p_c += jnp.where(steady, math.sqrt(k.c_c * (2 - k.c_c) * k.mass), 0) * move
        # Worse points count as if they were as far as the distribution reaches.
        lengths = jnp.sum(z * z, axis=1)
        signed = jnp.where(w < 0, w * n / jnp.maximum(lengths, 1e-12), w)
        lost = jnp.where(steady, 0, k.c_1 * k.c_c * (2 - k.c_c))
        C = (1 + lost - k.c_1 - k.c_mu * jnp.sum(w)) * self.C
        C = C + k.c_1 * jnp.outer(p_c, p_c) + k.c_mu * (y * signed[:, None]).T @ y
        growth = jnp.minimum(1.0, k.c_sigma / k.d_sigma * (norm / k.length - 1))
        squares, basis = jnp.linalg.eigh(0.5 * (C + C.T))
        top = jnp.max(squares)
        return Evolution(
            mean=self.mean + self.sigma * move,
            sigma=self.sigma * jnp.exp(growth),
            C=C,
            basis=basis,
            axes=jnp.sqrt(jnp.maximum(squares, 1e-14 * top)),
            p_sigma=p_sigma,
            p_c=p_c,
            generation=self.generation + 1,
        )

    @property
    def spread(self) -> Float[Array, ""]:
        """The largest standard deviation."""
        return self.sigma * jnp.max(self.axes)


def features(z: Points) -> Float[Array, "m k"]:
    """Constant, coordinates, their squares and, up to `FULL_UP_TO` dimensions, products."""
    m, n = z.shape
    columns = [jnp.ones((m, 1), z.dtype), z, 0.5 * z * z]
    if n <= FULL_UP_TO:
        i, j = np.triu_indices(n, 1)
        columns.append(z[:, i] * z[:, j])
    return jnp.concatenate(columns, axis=1)


def feature_count(n: int) -> int:
    """How many features there are."""
    return 1 + 2 * n + (n * (n - 1) // 2 if n <= FULL_UP_TO else 0)


def fitted(z: Points, values: Float[Array, " m"], mask: Bool[Array, " m"]) -> Float[Array, " k"]:
    """The coefficients of `features` that fit values best, the lowest ones most (the weight of a
    square falls from 20 to 1 with the rank), and curve little where data leave that open."""
    n = z.shape[1]
    value = jnp.where(mask, values, jnp.inf)
    count = jnp.sum(mask)
    rank = jnp.argsort(jnp.argsort(value))
    weight = 20 - 19 * jnp.clip(rank / jnp.maximum(count - 1, 1), 0, 1)
    weight = jnp.where(mask, weight, 0).astype(z.dtype)
    least = jnp.min(value)
    shift = jnp.where(mask, values - least, 0)
    # Far points in units of the distribution would decide everything.
    phi = features(jnp.where(mask[:, None], z, 0))
    size = jnp.sqrt(jnp.sum(weight[:, None] * phi * phi, axis=0) / jnp.maximum(jnp.sum(weight), 1))
    size = jnp.where(size > 0, size, 1)
    phi = phi / size[None]
    gram = phi.T @ (weight[:, None] * phi) / jnp.maximum(jnp.sum(weight), 1)
    ridge = jnp.where(jnp.arange(phi.shape[1]) <= n, 1e-10, 1e-8)
    right = phi.T @ (weight * shift) / jnp.maximum(jnp.sum(weight), 1)
    factor = jnp.linalg.cholesky(gram + jnp.diag(ridge.astype(z.dtype)))
    coefficients = jax.scipy.linalg.cho_solve((factor, True), right) / size
    return jnp.where(jnp.all(jnp.isfinite(coefficients)), coefficients, 0)


def agreement(
    a: Float[Array, " m"], b: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, ""]:
    """Kendall's rank correlation of the entries where `mask` is set."""
    both = mask[:, None] & mask[None, :] & ~jnp.eye(a.size, dtype=bool)
    signs = jnp.sign(a[:, None] - a[None, :]) * jnp.sign(b[:, None] - b[None, :])
    return jnp.sum(jnp.where(both, signs, 0)) / jnp.maximum(jnp.sum(both), 1)


def quadratic_of(
    coefficients: Float[Array, " k"], n: int
) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """The gradient and the Hessian at the origin of what `fitted` returns."""
    g = coefficients[1 : n + 1]
    H = jnp.diag(coefficients[n + 1 : 2 * n + 1])
    if n <= FULL_UP_TO:
        i, j = np.triu_indices(n, 1)
        H = H.at[i, j].set(coefficients[2 * n + 1 :]).at[j, i].set(coefficients[2 * n + 1 :])
    return g, H


__all__ = ["Evolution", "agreement", "fitted", "quadratic_of", "sample_size"]
