"""Strongly convex functions with proved constants, and their minimizers to more than double
precision: Newton's method with dense Hessians whose gradients are evaluated in long double."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LONG = np.longdouble


class Quadratic(eqx.Module):
    """y'Ay/2 - b'y."""

    A: Float[Array, "n n"]
    b: Float[Array, " n"]

    def __call__(self, y):
        return 0.5 * y @ (self.A @ y) - self.b @ y

    def gradient(self, y):
        return np.asarray(self.A).astype(LONG) @ y - np.asarray(self.b).astype(LONG)


class Logistic(eqx.Module):
    """Mean cross-entropy of a linear softmax classifier plus sum(w y^2)/2."""

    features: Float[Array, "samples features"]
    targets: Float[Array, "samples classes"]
    w: Float[Array, " n"]

    def __call__(self, y):
        z = self.features @ y.reshape(self.features.shape[1], -1)
        losses = jax.nn.logsumexp(z, axis=1) - jnp.sum(self.targets * z, axis=1)
        return jnp.mean(losses) + 0.5 * jnp.sum(self.w * y**2)

    def gradient(self, y):
        features = np.asarray(self.features).astype(LONG)
        z = features @ y.reshape(features.shape[1], -1)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p = p / p.sum(axis=1, keepdims=True) - np.asarray(self.targets)
        return (features.T @ p / len(features)).ravel() + np.asarray(self.w).astype(LONG) * y


class Variation(eqx.Module):
    """|y - noisy|^2/2 + w sum sqrt(diff(y)^2 + nu^2)."""

    noisy: Float[Array, " n"]
    w: Float[Array, ""]
    nu: Float[Array, ""]

    def __call__(self, y):
        length = jnp.sqrt(jnp.diff(y) ** 2 + self.nu**2)
        return 0.5 * jnp.sum((y - self.noisy) ** 2) + self.w * jnp.sum(length)

    def gradient(self, y):
        d, w, nu = np.diff(y), LONG(float(self.w)), LONG(float(self.nu))
        push = w * d / np.sqrt(d**2 + nu**2)
        r = y - np.asarray(self.noisy).astype(LONG)
        r[1:] += push
        r[:-1] -= push
        return r


class Case(NamedTuple):
    """A function h with its lower bound D on the Hessian and its self-concordance M."""

    name: str
    h: eqx.Module
    d: np.ndarray
    m: float


hessian = eqx.filter_jit(lambda h, y: jax.hessian(h)(y))
_value = eqx.filter_jit(lambda h, y: h(y))


def quadratic(rng, log_condition, n=16, looseness=0.9):
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    A = (Q * 10 ** np.linspace(0, log_condition, n)) @ Q.T
    A = 0.5 * (A + A.T)
    b = A @ rng.normal(size=n)
    d = np.full(n, looseness * (1 - 1e-14 * 10**log_condition))
    return Case(f"quadratic {log_condition:g}", Quadratic(jnp.asarray(A), jnp.asarray(b)), d, 0.0)


def logistic(rng, base, spread, samples=40, features=6, classes=3):
    a = rng.uniform(size=(samples, features))
    targets = np.eye(classes)[rng.integers(classes, size=samples)]
    w = np.exp(base + spread * rng.normal(size=features * classes))
    # Third cumulants are at most the range of the logits times variances (see Samples).
    m = float(np.sqrt(2 * np.max(np.sum(a**2, axis=1))))
    h = Logistic(jnp.asarray(a), jnp.asarray(targets), jnp.asarray(w))
    return Case(f"logistic {base:g}", h, w, m)


def variation(rng, w, nu, n=24):
    noisy = np.repeat(rng.normal(size=n // 4), 4) + 0.1 * rng.normal(size=n)
    # |phi'''| <= 3/(2 nu) phi'' and a difference is at most sqrt(2)|v|; the total variation is at
    # most k/(1 + k) of the Hessian.
    k = 4 * w / nu
    h = Variation(jnp.asarray(noisy), jnp.asarray(w), jnp.asarray(nu))
    return Case(f"variation {nu:g}", h, np.ones(n), 1.5 * np.sqrt(2) / nu * k / (1 + k))


def cases(rng):
    """One of each kind, soft and stiff."""
    return [
        quadratic(rng, 1.0),
        quadratic(rng, 4.0),
        logistic(rng, 0.0, 0.0),
        logistic(rng, -4.0, 1.0),
        logistic(rng, -8.0, 2.0),
        variation(rng, 0.1, 0.1),
        variation(rng, 1.0, 1e-2),
        variation(rng, 0.3, 1e-3),
    ]


def minimizer(h, n):
    """The minimizer of h in long double."""
    y = np.zeros(n, LONG)
    f = float(_value(h, jnp.zeros(n)))
    for _ in range(500):
        r = h.gradient(y)
        step = np.linalg.solve(np.asarray(hessian(h, jnp.asarray(y, float))), r.astype(float))
        size, slope = 1.0, float(r.astype(float) @ step)
        while True:
            new = y - size * step.astype(LONG)
            f_new = float(_value(h, jnp.asarray(new, float)))
            if f_new <= f - 1e-4 * size * slope + 1e-13 * abs(f) or size < 1e-12:
                break
            size *= 0.5
        y, f = new, f_new
        if size == 1 and np.linalg.norm(step) <= 1e-15 * (1 + np.linalg.norm(y.astype(float))):
            return y
    raise AssertionError(f"no minimizer of {type(h).__name__}")


def distances(case, y, solution):
    """`|y - y*|_H`, `|y - y*|_2`, the gradient and the Newton decrement at y, exactly."""
    y = np.asarray(y)
    e = y.astype(LONG) - solution
    H = np.asarray(hessian(case.h, jnp.asarray(y))).astype(float)
    r = case.h.gradient(y.astype(LONG)).astype(float)
    energy = float(np.sqrt(e @ (H.astype(LONG) @ e)))
    decrement = float(np.sqrt(max(r @ np.linalg.solve(H, r), 0.0)))
    return energy, float(np.linalg.norm(e.astype(float))), r, decrement
