"""Diffusion of a substance in the water of a soil that holds some of it back."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from tolerax.problems.hard_constrained import Equation
from tolerax.problems.library.base import check_count
from tolerax.problems.library.kept import kept
from tolerax.problems.library.operators import (
    FourierOperator,
    difference_matrix,
    legendre_products,
)

POROSITY, DENSITY, SORPTION = 0.29, 2880.0, 3.5e-4
HELD = (1 - POROSITY) / POROSITY * DENSITY * SORPTION
RAMP = 0.2  # how long the inlet takes
VERSION = 1  # of what `solve` computes: files of another one are not used
OUTLET = 3.0  # weight of the condition at the outlet beside the equation


class Soil(eqx.Module):
    """One member of the family: concentration at the beginning, diffusivity (times 500), exponent
    of the isotherm, concentration that the inlet comes to."""

    u0: Float[Array, "*b x"]
    diffusivity: Float[Array, "*b"]
    exponent: Float[Array, "*b"]
    inlet: Float[Array, "*b"]


def _positive(u: Array) -> tuple[Array, Array]:
    """`root = sqrt(u^2 + 1e-6)` and the smooth positive part `(u + root) / 2`, without the
    cancellation that this has below 0."""
    root = jnp.sqrt(u * u + 1e-6)
    larger = 0.5 * (root + jnp.where(u >= 0, u, -u))
    return root, jnp.where(u >= 0, larger, 0.25e-6 / larger)


def stored(u: Array, exponent: Array) -> Array:
    """How much substance a unit of soil holds, m(u) = u + a u^n, with a slope that stays finite at
    0: u is replaced by a smooth positive part there."""
    return u + HELD * _positive(u)[1] ** exponent


def retardation(u: Array, exponent: Array) -> Array:
    """R = m'."""
    root, positive = _positive(u)
    return 1 + HELD * exponent * positive**exponent / root


class DiffusionSorption(eqx.Module):
    """`m(u)_t = D u_xx` on 0 < x < 1, 0 < t < 1, with Freundlich's isotherm m(u) = u + a u^n.

    At the inlet u rises from what it is to a value of its own, at the outlet `u_x = 0`. What
    varies: a smooth state at the beginning (three cosines, between 0.02 and 0.4), D in 0.1 to 0.4
    (2e-4 to 8e-4 with 500 as the unit of time), n in 0.75 to 0.95, the inlet in 0.5 to 1. The
    published family (Takamoto et al., *PDEBench*, 2022) has one parameter.

    - `nx`, `nt`: points of the grid, at `x` and `t`. `equation`: for [`HardConstrained`][], with a
      lift that has the values at the beginning and at the inlet. With `spans` its `balance` says
      for each of so many spans of time that what is stored has changed by what came through both
      ends.

    >>> import jax
    >>> family = DiffusionSorption(17, 11)
    >>> soils = family.sample(jax.random.key(0), 2)
    >>> u = family.solve(soils)
    >>> u.shape, bool((u > 0).all() and (u <= 1).all())
    ((2, 17, 11), True)
    """

    # Arrays would be taken for weights where a network holds the family.
    nx: int = eqx.field(static=True)
    nt: int = eqx.field(static=True)
    spans: int = eqx.field(static=True)

    def __init__(self, nx: int = 48, nt: int = 41, spans: int = 0):
        self.nx, self.nt = check_count("nx", nx, 6), check_count("nt", nt, 6)
        self.spans = check_count("spans", spans, 0, nt - 1)

    @property
    def x(self) -> np.ndarray:
        """Points from the inlet to the outlet."""
        return np.linspace(0, 1, self.nx)

    @property
    def t(self) -> np.ndarray:
        """Times, the first at the beginning."""
        return np.linspace(0, 1, self.nt)

    def sample(self, key: PRNGKeyArray, count: int) -> Soil:
        """Soils drawn from the family, with an axis in front."""
        keys = jax.random.split(key, 5)

        def between(k: int, low: float, high: float) -> Array:
            return jax.random.uniform(keys[k], (count,), minval=low, maxval=high)

        waves = jnp.cos(jnp.pi * jnp.arange(1, 4)[:, None] * self.x[None])
        size = jax.random.normal(keys[0], (count, 3)) * jnp.array([0.08, 0.05, 0.03])[None]
        u0 = between(1, 0.1, 0.3)[:, None] + size @ waves
        return Soil(
            # A smooth clip: the state has no kinks.
            u0=0.21 + 0.19 * jnp.tanh((u0 - 0.21) / 0.19),
            diffusivity=between(2, 0.1, 0.4),
            exponent=between(3, 0.75, 0.95),
            inlet=between(4, 0.5, 1.0),
        )

    def features(self, soil: Soil) -> Float[Array, "6 x t"]:
        """What a network is shown of one soil."""
        shape = (len(self.x), len(self.t))
        x, t = jnp.broadcast_to(self.x[:, None], shape), jnp.broadcast_to(self.t[None], shape)
        full = lambda value: jnp.full(shape, 1.0) * value  # noqa: E731
        more = [full(5 * soil.diffusivity), full(5 * (soil.exponent - 0.85)), full(soil.inlet)]
        return jnp.stack([self.lift(soil), x, t, *more])

    def lift(self, soil: Soil) -> Float[Array, "x t"]:
        """A field with the values at the beginning and at the inlet, and no slope at the outlet."""
        rise = (soil.inlet - soil.u0[0]) * (1 - jnp.exp(-((self.t / RAMP) ** 2)))
        return soil.u0[:, None] + (1 - self.x[:, None]) ** 2 * rise[None]

    @property
    def equation(self) -> Equation:
        """The equation inside, the outlet at x = 1."""
        hx, ht = self.x[1], self.t[1]
        first, second = (difference_matrix(len(self.x), hx, k, 5 + (k == 2)) for k in (1, 2))
        in_time = difference_matrix(len(self.t), ht)
        outlet = np.zeros((len(self.x), len(self.t)), bool)
        outlet[-1] = True

        def channels(u: Array) -> Array:
            return jnp.stack([u, jnp.asarray(first) @ u, jnp.asarray(second) @ u, u @ in_time.T])

        def data(soil: Soil) -> tuple:
            return soil.diffusivity, soil.exponent, jnp.asarray(outlet)

        def residual(z: Array, data: tuple) -> Array:
            (u, u_x, u_xx, u_t), (D, n, outlet) = z, data
            inside = retardation(u, n) * u_t - D * u_xx
            return jnp.where(outlet, OUTLET * u_x, inside)

        balance = self.balance if self.spans else None
        return Equation(channels, residual, data=data, lift=self.lift, balance=balance)

    def balance(self, z: Float[Array, "4 x t"], soil: Soil) -> Float[Array, " spans"]:
        """What is stored at the end of each span less at its beginning, less what came in."""
        u, u_x = z[0], z[1]
        held = self.storage(u, soil)
        came = soil.diffusivity * (u_x[-1] - u_x[0])
        ends = np.round(np.linspace(0, len(self.t) - 1, self.spans + 1)).astype(int)
        rows = np.zeros((self.spans, len(self.t)))
        for k, (a, b) in enumerate(itertools.pairwise(ends)):
            rows[k, a : b + 1] = _quadrature(int(b - a) + 1, 1 / (len(self.t) - 1))
        return held[ends[1:]] - held[ends[:-1]] - jnp.asarray(rows) @ came

    def storage(self, u: Float[Array, "x t"], soil: Soil) -> Float[Array, " t"]:
        """How much substance is stored at each time, the integral of m(u)."""
        return jnp.asarray(_quadrature(len(self.x), 1 / (len(self.x) - 1))) @ stored(
            u, soil.exponent
        )

    def solve(self, soils: Soil, refine: int = 4, *, cache: bool = False) -> Float[Array, "b x t"]:
        """Reference fields: Crank-Nicolson steps of finite volumes, `refine` times as fine in space
        and twice that in time; Newton's method in each step.

        - `cache`: keep them in the user's cache folder, and look there first (`TOLERAX_CACHE`, if
          that is set, names another).
        """
        refine = check_count("refine", refine, 1)
        compute = lambda: _solved(self, soils, refine)  # noqa: E731
        given = (self, soils, refine)
        return kept(f"diffusion-sorption-{VERSION}", given, compute) if cache else compute()


def _quadrature(n: int, h: float) -> np.ndarray:
    """Gregory's weights of an integral over n equidistant points: of fourth order, of second below
    6 points."""
    weights = np.full(n, h)
    ends = np.array([3 / 8, 7 / 6, 23 / 24]) * h if n >= 6 else np.array([h / 2])
    weights[: len(ends)] = ends
    weights[-len(ends) :] = ends[::-1]
    return weights


@eqx.filter_jit
def _solved(family: DiffusionSorption, soils: Soil, refine: int) -> Float[Array, "b x t"]:
    nx, nt = len(family.x), len(family.t)
    fine, steps = refine * (nx - 1) + 1, 2 * refine
    h, dt = 1 / (fine - 1), 1 / ((nt - 1) * steps)
    at = jnp.linspace(0, 1, fine)

    def one(soil: Soil) -> Array:
        u0 = _through(soil.u0, at)
        D, n = soil.diffusivity, soil.exponent
        inlet = lambda t: u0[0] + (soil.inlet - u0[0]) * (1 - jnp.exp(-((t / RAMP) ** 2)))  # noqa: E731

        def spread(u: Array) -> Array:
            """u_xx at the nodes behind the inlet; the outlet mirrors."""
            wide = jnp.concatenate([u, u[-2:-1]])
            return (wide[:-2] - 2 * wide[1:-1] + wide[2:]) / h**2

        def step(u: Array, k: Array) -> tuple[Array, None]:
            left = inlet((k + 1) * dt)
            known = stored(u[1:], n) + 0.5 * dt * D * spread(u)
            off = jnp.full(fine - 1, -0.5 * dt * D / h**2)
            lower = off.at[-1].mul(2).at[0].set(0)
            upper = off.at[-1].set(0)

            def newton(_: Any, v: Array) -> Array:
                whole = jnp.concatenate([left[None], v])
                gap = stored(v, n) - 0.5 * dt * D * spread(whole) - known
                middle = retardation(v, n) + dt * D / h**2
                move = jax.lax.linalg.tridiagonal_solve(lower, middle, upper, gap[:, None])
                return v - move[:, 0]

            v = jax.lax.fori_loop(0, 4, newton, u[1:])
            return jnp.concatenate([left[None], v]), None

        def span(u: Array, k: Array) -> tuple[Array, Array]:
            u, _ = jax.lax.scan(step, u, k * steps + jnp.arange(steps))
            return u, u[::refine]

        _, later = jax.lax.scan(span, u0, jnp.arange(nt - 1))
        return jnp.concatenate([u0[None, ::refine], later]).T

    return jax.vmap(one)(soils)


def _through(values: Array, at: Array) -> Array:
    """A cosine series through values at equidistant nodes of [0, 1]."""
    n = values.shape[0]
    k = np.arange(n)
    nodes = np.cos(np.pi * k[None] * np.linspace(0, 1, n)[:, None])
    return jnp.cos(jnp.pi * k[None] * at[:, None]) @ (jnp.asarray(np.linalg.inv(nodes)) @ values)


class SorptionBasis(eqx.Module):
    """A network for [`DiffusionSorption`][]: what a Fourier neural operator adds to products of
    Legendre polynomials, times a field that vanishes at the beginning and at the inlet.

    The polynomials make a basis of it before anything is learned, in each part of the grid too.

    - `outputs`: how many basis functions.
    - `polynomials`: False for what the operator gives alone, as for a network of one output that is
      the solution.
    """

    operator: FourierOperator
    family: DiffusionSorption
    polynomials: bool = eqx.field(static=True)

    def __init__(
        self,
        family: DiffusionSorption,
        outputs: int,
        *,
        width: int = 24,
        modes: int = 6,
        layers: int = 3,
        polynomials: bool = True,
        key: PRNGKeyArray,
    ):
        self.family, self.polynomials = family, polynomials
        self.operator = FourierOperator(
            6,
            outputs,
            width=width,
            modes=(modes, modes),
            layers=layers,
            padding=(8, 8),
            gain=0.1 if polynomials else 1.0,
            key=key,
        )

    def __call__(self, soil: Soil) -> Float[Array, "n x t"]:
        x, t = self.family.x[:, None], self.family.t[None]
        basis = self.operator(self.family.features(soil))
        if self.polynomials:
            basis = basis + legendre_products(len(basis), self.family.x, self.family.t)
        return (jnp.tanh(4 * x) * jnp.tanh(4 * t))[None] * basis
