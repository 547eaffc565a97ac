"""The 24 noiseless functions of BBOB, compiled: minimum `f_opt` within the box [-5, 5]^n.

Source: Hansen, Finck, Ros, Auger (*Real-Parameter Black-Box Optimization Benchmarking 2009:
Noiseless Functions Definitions*, INRIA RR-6829). Instances follow the generator given there, so
that numbers of functions and instances mean what they mean elsewhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FUNCTIONS = range(1, 25)
PEAKS = 101


class Instance(NamedTuple):
    """What distinguishes two functions, as arrays: one compilation serves all of a dimension."""

    kind: Array
    x_opt: Float[Array, " n"]
    f_opt: Float[Array, ""]
    rotation: Float[Array, "n n"]
    other: Float[Array, "n n"]
    peaks: Float[Array, "peaks n"]
    heights: Float[Array, " peaks"]
    scales: Float[Array, "peaks n"]


# -- instances ------------------------------------------------------------------------------------


def _uniform(count: int, seed: int) -> np.ndarray:
    """The generator of the definition: Park and Miller's with a shuffle of 32."""
    modulus, factor = 2147483647, 16807
    now, table = max(abs(int(seed)), 1), [0] * 32
    for i in reversed(range(40)):
        now = now * factor % modulus
        if i < 32:
            table[i] = now
    shown, out = table[0], np.empty(count)
    for i in range(count):
        now = now * factor % modulus
        slot = shown // 67108865
        shown, table[slot] = table[slot], now
        out[i] = shown / 2.147483647e9
    return np.where(out == 0, 1e-99, out)


def _normal(count: int, seed: int) -> np.ndarray:
    u = _uniform(2 * count, seed)
    g = np.sqrt(-2 * np.log(u[:count])) * np.cos(2 * np.pi * u[count:])
    return np.where(g == 0, 1e-99, g)


def _rotation(n: int, seed: int) -> np.ndarray:
    """Gaussian columns made orthogonal, one after the other."""
    b = _normal(n * n, seed).reshape(n, n).T.copy()
    for i in range(n):
        for j in range(i):
            b[:, i] -= (b[:, i] @ b[:, j]) * b[:, j]
        b[:, i] /= np.linalg.norm(b[:, i])
    return b


def _optimum(n: int, seed: int) -> np.ndarray:
    x = 8 * np.floor(1e4 * _uniform(n, seed)) / 1e4 - 4
    return np.where(x == 0, -1e-5, x)


def _peaks(n: int, seed: int, count: int, rotation: np.ndarray) -> tuple[np.ndarray, ...]:
    """Gallagher's peaks: places (rotated), heights and scales."""
    width, half = (10.0, 5.0) if count == 101 else (9.8, 4.9)
    first = np.sqrt(1000.0) if count == 101 else 1000.0
    order = np.argsort(_uniform(count - 1, seed), kind="stable")
    condition = np.concatenate([[first], 1000.0 ** (order / (count - 2))])
    heights = np.concatenate([[10.0], 1.1 + 8.0 * np.arange(count - 1) / (count - 2)])
    scales = np.empty((count, n))
    for i in range(count):
        turn = np.argsort(_uniform(n, seed + 1000 * i), kind="stable")
        scales[i] = condition[i] ** (turn / (n - 1) - 0.5)
    places = width * _uniform(n * count, seed).reshape(count, n) - half
    places[0] *= 0.8
    more = PEAKS - count
    return (
        np.pad(places @ rotation.T, ((0, more), (0, 0))),
        np.pad(heights, (0, more)),
        np.pad(scales, ((0, more), (0, 0))),
        places[0],
    )


def instance(kind: int, number: int, n: int) -> Instance:
    """Function `kind` (1 to 24), instance `number`, in n >= 2 dimensions."""
    seed = {4: 3, 18: 17}.get(kind, kind) + 10000 * number
    ratio = _normal(1, seed)[0] / _normal(1, seed + 1)[0]
    f_opt = np.clip(np.floor(100 * 100 * ratio + 0.5) / 100, -1000.0, 1000.0)
    rotation, other = _rotation(n, seed + 1000000), _rotation(n, seed)
    x_opt = _optimum(n, seed + 1000000 if kind == 12 else seed)
    peaks = np.zeros((PEAKS, n)), np.zeros(PEAKS), np.zeros((PEAKS, n))
    if kind == 4:
        x_opt[::2] = np.abs(x_opt[::2])
    elif kind == 5:
        x_opt = 5 * np.sign(x_opt)
    elif kind == 8:
        x_opt *= 0.75
    elif kind in (9, 19):
        x_opt = 0.5 * other.T @ np.ones(n) / max(1.0, np.sqrt(n) / 8)
    elif kind == 20:
        x_opt = np.where(_uniform(n, seed) < 0.5, -1, 1) * 0.5 * 4.2096874637
    elif kind in (21, 22):
        *peaks, x_opt = _peaks(n, seed, 101 if kind == 21 else 21, other)
    elif kind == 24:
        x_opt = np.where(_normal(n, seed) < 0, -1, 1) * 1.25
    arrays = (x_opt, f_opt, rotation, other, *peaks)
    return Instance(jnp.asarray(kind - 1), *(jnp.asarray(a, float) for a in arrays))


# -- transformations ------------------------------------------------------------------------------


def _ramp(n: int) -> Array:
    return jnp.arange(n) / (n - 1)


def _oscillated(x: Array) -> Array:
    t = 10 * jnp.log(jnp.where(x == 0, 1, jnp.abs(x)))
    up = t + 0.49 * (jnp.sin(t) + jnp.sin(0.79 * t))
    down = t + 0.49 * (jnp.sin(0.55 * t) + jnp.sin(0.31 * t))
    return jnp.sign(x) * jnp.exp(0.1 * jnp.where(x > 0, up, down))


def _skewed(x: Array, beta: float) -> Array:
    positive = jnp.maximum(x, 0)
    return jnp.where(x > 0, positive ** (1 + beta * _ramp(x.size) * jnp.sqrt(positive)), x)


def _outside(x: Array) -> Array:
    return jnp.sum(jnp.maximum(jnp.abs(x) - 5, 0) ** 2)


def _mixed(p: Instance, z: Array, condition: float) -> Array:
    return p.rotation @ (condition ** (0.5 * _ramp(z.size)) * (p.other @ z))


def _rastrigin(z: Array) -> Array:
    return 10 * (z.size - jnp.sum(jnp.cos(2 * jnp.pi * z))) + jnp.sum(z * z)


def _rosenbrock(z: Array) -> Array:
    return jnp.sum(100 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1) ** 2)


# -- functions ------------------------------------------------------------------------------------


def _sphere(p: Instance, x: Array) -> Array:
    return jnp.sum((x - p.x_opt) ** 2)


def _separable_ellipsoid(p: Instance, x: Array) -> Array:
    return jnp.sum(1e6 ** _ramp(x.size) * _oscillated(x - p.x_opt) ** 2)


def _separable_rastrigin(p: Instance, x: Array) -> Array:
    z = _skewed(_oscillated(x - p.x_opt), 0.2)
    return _rastrigin(10 ** (0.5 * _ramp(x.size)) * z)


def _bueche_rastrigin(p: Instance, x: Array) -> Array:
    z = _oscillated(x - p.x_opt)
    steep = jnp.where((jnp.arange(x.size) % 2 == 0) & (z > 0), 10.0, 1.0)
    return _rastrigin(steep * 10 ** (0.5 * _ramp(x.size)) * z) + 100 * _outside(x)


def _slope(p: Instance, x: Array) -> Array:
    s = jnp.sign(p.x_opt) * 10 ** _ramp(x.size)
    inside = x * p.x_opt < 25
    return jnp.sum(5 * jnp.abs(s) - s * jnp.where(inside, x, p.x_opt))


def _attractive_sector(p: Instance, x: Array) -> Array:
    z = _mixed(p, x - p.x_opt, 10.0)
    total = jnp.sum(jnp.where(z * p.x_opt > 0, 100 * z, z) ** 2)
    return _oscillated(total) ** 0.9


def _step_ellipsoid(p: Instance, x: Array) -> Array:
    z = 10 ** (0.5 * _ramp(x.size)) * (p.other @ (x - p.x_opt))
    steps = jnp.where(jnp.abs(z) > 0.5, jnp.floor(z + 0.5), jnp.floor(10 * z + 0.5) / 10)
    total = jnp.sum(100 ** _ramp(x.size) * (p.rotation @ steps) ** 2)
    return 0.1 * jnp.maximum(1e-4 * jnp.abs(z[0]), total) + _outside(x)


def _shifted_rosenbrock(p: Instance, x: Array) -> Array:
    return _rosenbrock(max(1.0, x.size**0.5 / 8) * (x - p.x_opt) + 1)


def _rotated_rosenbrock(p: Instance, x: Array) -> Array:
    return _rosenbrock(max(1.0, x.size**0.5 / 8) * (p.other @ x) + 0.5)


def _ellipsoid(p: Instance, x: Array) -> Array:
    return jnp.sum(1e6 ** _ramp(x.size) * _oscillated(p.rotation @ (x - p.x_opt)) ** 2)


def _discus(p: Instance, x: Array) -> Array:
    z = _oscillated(p.rotation @ (x - p.x_opt)) ** 2
    return 1e6 * z[0] + jnp.sum(z[1:])


def _bent_cigar(p: Instance, x: Array) -> Array:
    z = (p.rotation @ _skewed(p.rotation @ (x - p.x_opt), 0.5)) ** 2
    return z[0] + 1e6 * jnp.sum(z[1:])


def _sharp_ridge(p: Instance, x: Array) -> Array:
    z = _mixed(p, x - p.x_opt, 10.0)
    return z[0] ** 2 + 100 * jnp.linalg.norm(z[1:])


def _different_powers(p: Instance, x: Array) -> Array:
    z = jnp.abs(p.rotation @ (x - p.x_opt))
    return jnp.sqrt(jnp.sum(z ** (2 + 4 * _ramp(x.size))))


def _rotated_rastrigin(p: Instance, x: Array) -> Array:
    z = _skewed(_oscillated(p.rotation @ (x - p.x_opt)), 0.2)
    return _rastrigin(_mixed(p, z, 10.0))


def _weierstrass(p: Instance, x: Array) -> Array:
    z = _mixed(p, _oscillated(p.rotation @ (x - p.x_opt)), 0.01)
    k = jnp.arange(12)
    series = lambda z: jnp.sum(0.5**k * jnp.cos(2 * jnp.pi * 3.0**k * (z + 0.5)))  # noqa: E731
    mean = jnp.mean(jax.vmap(series)(z))
    return 10 * (mean - series(jnp.zeros(()))) ** 3 + 10 / x.size * _outside(x)


def _schaffers(condition: float):
    def fun(p: Instance, x: Array) -> Array:
        z = _skewed(p.rotation @ (x - p.x_opt), 0.5)
        z = condition ** (0.5 * _ramp(x.size)) * (p.other @ z)
        s = z[:-1] ** 2 + z[1:] ** 2
        mean = jnp.mean(s**0.25 * (1 + jnp.sin(50 * s**0.1) ** 2))
        return mean**2 + 10 * _outside(x)

    return fun


def _griewank_rosenbrock(p: Instance, x: Array) -> Array:
    z = max(1.0, x.size**0.5 / 8) * (p.other @ x) + 0.5
    s = 100 * (z[:-1] ** 2 - z[1:]) ** 2 + (1 - z[:-1]) ** 2
    return 10 + 10 * jnp.mean(s / 4000 - jnp.cos(s))


def _schwefel(p: Instance, x: Array) -> Array:
    far = 2 * jnp.abs(p.x_opt)
    x_hat = 2 * jnp.sign(p.x_opt) * x
    z_hat = x_hat.at[1:].add(0.25 * (x_hat[:-1] - far[:-1]))
    z = 100 * (10 ** (0.5 * _ramp(x.size)) * (z_hat - far) + far)
    penalty = jnp.sum(jnp.maximum(jnp.abs(z) - 500, 0) ** 2)
    return 0.01 * (penalty + 418.9828872724339 - jnp.mean(z * jnp.sin(jnp.sqrt(jnp.abs(z)))))


def _gallagher(p: Instance, x: Array) -> Array:
    away = jnp.sum(p.scales * ((p.other @ x)[None] - p.peaks) ** 2, axis=1)
    highest = jnp.max(p.heights * jnp.exp(-0.5 / x.size * away))
    return _oscillated(10 - highest) ** 2 + _outside(x)


def _katsuura(p: Instance, x: Array) -> Array:
    n = x.size
    z = _mixed(p, x - p.x_opt, 100.0)[:, None]
    power = 2.0 ** jnp.arange(1, 33)[None]
    rough = jnp.sum(jnp.abs(power * z - jnp.floor(power * z + 0.5)) / power, axis=1)
    product = jnp.prod((1 + jnp.arange(1, n + 1) * rough) ** (10 / n**1.2))
    return 10 / n**2 * (product - 1) + _outside(x)


def _lunacek(p: Instance, x: Array) -> Array:
    n, first = x.size, 2.5
    s = 1 - 0.5 / ((n + 20) ** 0.5 - 4.1)
    second = -(((first**2 - 1) / s) ** 0.5)
    x_hat = 2 * jnp.sign(p.x_opt) * x
    bowls = jnp.minimum(jnp.sum((x_hat - first) ** 2), n + s * jnp.sum((x_hat - second) ** 2))
    z = _mixed(p, x_hat - first, 100.0)
    return bowls + 10 * (n - jnp.sum(jnp.cos(2 * jnp.pi * z))) + 1e4 * _outside(x)


KINDS = (
    _sphere,
    _separable_ellipsoid,
    _separable_rastrigin,
    _bueche_rastrigin,
    _slope,
    _attractive_sector,
    _step_ellipsoid,
    _shifted_rosenbrock,
    _rotated_rosenbrock,
    _ellipsoid,
    _discus,
    _bent_cigar,
    _sharp_ridge,
    _different_powers,
    _rotated_rastrigin,
    _weierstrass,
    _schaffers(10.0),
    _schaffers(1000.0),
    _griewank_rosenbrock,
    _schwefel,
    _gallagher,
    _gallagher,
    _katsuura,
    _lunacek,
)


def value(p: Instance, x: Float[Array, " n"]) -> Float[Array, ""]:
    """The value at x, of which the least is `p.f_opt`."""
    return jax.lax.switch(p.kind, KINDS, p, x) + p.f_opt
