"""Vorticity of a flow in a square that repeats itself: data, equation and a network."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from tolerax.problems.hard_constrained import Equation
from tolerax.problems.library.base import check_count, check_real
from tolerax.problems.library.kept import kept
from tolerax.problems.library.operators import FourierOperator, difference_matrix

VERSION = 1  # of what `solve` computes: files of another one are not used


class Flow(eqx.Module):
    """One member of the family: vorticity at the beginning, and the curl of the force."""

    w0: Float[Array, "*b x y"]
    force: Float[Array, "*b x y"]


class NavierStokes(eqx.Module):
    """`w_t + u w_x + v w_y = nu (w_xx + w_yy) + f` on the unit square, periodic, 0 < t < T.

    (u, v) is the velocity without divergence whose curl is w: `u = psi_y`, `v = -psi_x` with
    `-(psi_xx + psi_yy) = w`. What varies: w at the beginning, a Gaussian random field of mean 0 and
    variance 1 with the covariance `exp(-2 sin(pi d)^2 / length^2)` along each axis, and f, another
    one times `forcing`. A field has the axes (t, x, y).

    - `n`: points along x and y. `times`: of the frames, the first at t = 0. `duration`: T.
      `viscosity`: nu.
    - `equation`: for [`HardConstrained`][], with the vorticity at the beginning as the lift.
      Derivatives in space are those of the trigonometric interpolant, those in time differences of
      five frames. Rows are weighted by `1.05 - t / T`.

    Source of the set-up (nu = 1e-4, T = 5, length 0.8, no force): Chalapathi, Du, Krishnapriyan
    (ICLR 2024, arXiv 2402.13412).

    >>> import jax
    >>> family = NavierStokes(16, 5, duration=0.5)
    >>> flows = family.sample(jax.random.key(0), 2)
    >>> w = family.solve(flows)
    >>> w.shape, bool((w[:, 0] == flows.w0).all())
    ((2, 5, 16, 16), True)
    """

    n: int = eqx.field(static=True)
    times: int = eqx.field(static=True)
    duration: float = eqx.field(static=True)
    viscosity: float = eqx.field(static=True)
    forcing: float = eqx.field(static=True)
    length: float = eqx.field(static=True)

    def __init__(
        self,
        n: int = 32,
        times: int = 17,
        *,
        duration: float = 2.0,
        viscosity: float = 1e-3,
        forcing: float = 0.0,
        length: float = 0.8,
    ):
        if check_count("n", n, 8) % 2:
            raise ValueError(f"n is {n}: give an even number of points.")
        self.n = check_count("n", n, 8)
        self.times = check_count("times", times, 5)
        self.duration = check_real("duration", duration, 1e-6)
        self.viscosity = check_real("viscosity", viscosity, 0.0)
        self.forcing = check_real("forcing", forcing, 0.0)
        self.length = check_real("length", length, 0.2)

    @property
    def x(self) -> np.ndarray:
        """Points along each axis."""
        return np.arange(self.n) / self.n

    @property
    def t(self) -> np.ndarray:
        """Times of the frames."""
        return np.linspace(0, self.duration, self.times)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, points along x, points along y."""
        return self.times, self.n, self.n

    def sample(self, key: PRNGKeyArray, count: int) -> Flow:
        """Flows drawn from the family, with an axis in front. A key gives the same fields on every
        grid that is fine enough for them."""
        waves = jnp.asarray(_waves(self.x, self.length))
        normal = jax.random.normal(key, (2, count, len(waves), len(waves)))
        # The constant is left out; what is left has the variance 1 again.
        normal = normal.at[..., 0, 0].set(0) / math.sqrt(1 - float(waves[0, 0]) ** 4)
        w0, force = jnp.einsum("sbij,ix,jy->sbxy", normal, waves, waves)
        return Flow(w0, self.forcing * force)

    @property
    def equation(self) -> Equation:
        """The equation at every point and time."""
        in_time = difference_matrix(self.times, self.t[1])

        def channels(w: Array) -> Array:
            u, v, w_x, w_y, spread = _differentiated(w)
            rate = jnp.einsum("st,txy->sxy", jnp.asarray(in_time), w)
            return jnp.stack([rate - self.viscosity * spread, u, v, w_x, w_y])

        # What goes wrong early stays wrong: rows count by the time that is left.
        weight = (1.05 - self.t / self.duration)[:, None, None]

        def data(flow: Flow) -> tuple[Array, Array]:
            full = lambda value: jnp.broadcast_to(value, self.grid)  # noqa: E731
            return full(flow.force[None]), full(jnp.asarray(weight))

        def residual(z: Array, data: tuple[Array, Array]) -> Array:
            (rate, u, v, w_x, w_y), (force, weight) = z, data
            return weight * (rate + u * w_x + v * w_y - force)

        return Equation(channels, residual, data=data, lift=self.lift)

    def lift(self, flow: Flow) -> Float[Array, "t x y"]:
        """The vorticity at the beginning, at all times."""
        return jnp.broadcast_to(flow.w0[None], self.grid)

    def features(self, flow: Flow) -> Float[Array, "6 t x y"]:
        """What a network is shown of one flow: the vorticity at the beginning, its first and second
        derivative in time there, the velocity, and time."""

        def rate(w: Array) -> Array:
            u, v, w_x, w_y, spread = _differentiated(w)
            return self.viscosity * spread - u * w_x - v * w_y + flow.force

        u, v, *_ = _differentiated(flow.w0)
        first = rate(flow.w0)
        _, second = jax.jvp(rate, (flow.w0,), (first,))
        still = jnp.stack([flow.w0, first, 0.5 * second, 4 * u, 4 * v])[:, None]
        t = jnp.asarray(self.t / self.duration)[None, :, None, None]
        return jnp.concatenate([jnp.broadcast_to(f, (f.shape[0], *self.grid)) for f in (still, t)])

    def solve(
        self, flows: Flow, refine: int = 2, steps: int | None = None, *, cache: bool = False
    ) -> Float[Array, "b t x y"]:
        """Reference fields: a pseudo-spectral method without aliasing on a grid `refine` times as
        fine, with `steps` from frame to frame of a Runge-Kutta method of fourth order that is exact
        for the viscous term.

        By default a step is at most the spacing of the finer grid over the speed 1: enough as long
        as velocities stay below it (without a force they are 0.2 to 0.4).

        - `cache`: keep them in the user's cache folder, and look there first (`TOLERAX_CACHE`, if
          that is set, names another).
        """
        refine = check_count("refine", refine, 1)
        interval = self.duration / (self.times - 1)
        few = math.ceil(interval * refine * self.n)
        steps = few if steps is None else check_count("steps", steps, 1)
        compute = lambda: _solved(self, flows, refine, steps)  # noqa: E731
        given = (self, flows, refine, steps)
        return kept(f"navier-stokes-{VERSION}", given, compute) if cache else compute()


def _waves(x: np.ndarray, length: float) -> Float[np.ndarray, "waves x"]:
    """Functions along one axis whose sum with independent normal weights has the covariance
    `exp(-2 sin(pi d)^2 / length^2)`: its cosine series at 64 points has what matters."""
    covariance = np.exp(-2 * np.sin(np.pi * np.arange(64) / 64) ** 2 / length**2)
    power = np.fft.rfft(covariance).real / 64
    k = np.arange(1, 16)[:, None]
    size = np.sqrt(2 * np.maximum(power[1:16], 0))[:, None]
    angle = 2 * np.pi * k * x[None]
    constant = np.full((1, len(x)), np.sqrt(power[0]))
    # What the grid cannot show is left out.
    seen = np.arange(1, 16) < len(x) / 2
    return np.concatenate([constant, (size * np.cos(angle))[seen], (size * np.sin(angle))[seen]])


def _derivatives(n: int) -> tuple[Complex[np.ndarray, "n half"] | Float[np.ndarray, "n half"], ...]:
    """Factors of the Fourier coefficients of w on n x n points that give u, v, w_x, w_y and the
    Laplacian. The highest frequency of an even n has no first derivative."""
    k = np.fft.fftfreq(n, 1 / n)
    first = np.where(np.abs(k) == n / 2, 0, k)
    kx, ky = 2 * np.pi * first[:, None], 2 * np.pi * first[None, : n // 2 + 1]
    square = (2 * np.pi) ** 2 * (k[:, None] ** 2 + k[None, : n // 2 + 1] ** 2)
    inverse = np.where(square > 0, 1 / np.where(square > 0, square, 1), 0)
    return 1j * ky * inverse, -1j * kx * inverse, 1j * kx, 1j * ky, -square


def _differentiated(w: Float[Array, "*t n n"]) -> list[Float[Array, "*t n n"]]:
    """u, v, w_x, w_y and the Laplacian of w."""
    hat = jnp.fft.rfft2(w)
    wide = (None,) * (w.ndim - 2)
    return [
        jnp.fft.irfft2(factor[wide] * hat, w.shape[-2:]) for factor in _derivatives(w.shape[-1])
    ]


@eqx.filter_jit
def _solved(family: NavierStokes, flows: Flow, refine: int, steps: int) -> Float[Array, "b t x y"]:
    n = family.n
    fine = refine * n
    dt = family.duration / (family.times - 1) / steps
    factors = [jnp.asarray(factor) for factor in _derivatives(fine)]
    k = np.abs(np.fft.fftfreq(fine, 1 / fine))
    whole = jnp.asarray((k[:, None] < fine / 3) & (k[None, : fine // 2 + 1] < fine / 3))
    half = jnp.exp(0.5 * dt * family.viscosity * factors[4])

    def one(flow: Flow) -> Array:
        force = jnp.where(whole, jnp.fft.rfft2(_finer(flow.force, fine)), 0)

        def slope(hat: Array) -> Array:
            u, v, w_x, w_y = (jnp.fft.irfft2(factor * hat, (fine, fine)) for factor in factors[:4])
            return force - jnp.where(whole, jnp.fft.rfft2(u * w_x + v * w_y), 0)

        def step(hat: Array, _: None) -> tuple[Array, None]:
            # Runge and Kutta's steps for exp(-nu Laplacian t) w.
            a = slope(hat)
            b = slope(half * (hat + 0.5 * dt * a))
            c = slope(half * hat + 0.5 * dt * b)
            d = slope(half * (half * hat + dt * c))
            move = half * half * a + 2 * half * (b + c) + d
            return half * half * hat + dt / 6 * move, None

        def span(hat: Array, _: None) -> tuple[Array, Array]:
            hat, _ = jax.lax.scan(step, hat, length=steps)
            return hat, jnp.fft.irfft2(hat, (fine, fine))[::refine, ::refine]

        start = jnp.where(whole, jnp.fft.rfft2(_finer(flow.w0, fine)), 0)
        _, later = jax.lax.scan(span, start, length=family.times - 1)
        return jnp.concatenate([flow.w0[None], later])

    return jax.vmap(one)(flows)


def _finer(field: Float[Array, "x y"], fine: int) -> Float[Array, "fine fine"]:
    """The trigonometric interpolant on a finer grid, without the highest frequency."""
    n = field.shape[0]
    if fine == n:
        return field
    hat = jnp.fft.fft2(field)
    k = np.fft.fftfreq(n, 1 / n).astype(int)
    low = k[np.abs(k) < n / 2]
    wide = jnp.zeros((fine, fine), hat.dtype)
    wide = wide.at[low[:, None], low[None]].set(hat[low[:, None], low[None]])
    return jnp.fft.ifft2(wide).real * (fine / n) ** 2


class VorticityBasis(eqx.Module):
    """A network for [`NavierStokes`][]: what a Fourier neural operator adds to a basis, with mean 0
    at each time and 0 at the beginning.

    The basis, before anything is learned: the vorticity at the beginning and its first two
    derivatives in time, times t and t^2, and t times the waves of lowest frequency.

    - `outputs`: how many basis functions.
    - `start`: False for what the operator gives alone, as for a network of one output that is the
      solution.
    """

    operator: FourierOperator
    family: NavierStokes
    start: bool = eqx.field(static=True)

    def __init__(
        self,
        family: NavierStokes,
        outputs: int,
        *,
        width: int = 16,
        modes: int = 6,
        layers: int = 3,
        hidden: int = 64,
        start: bool = True,
        key: PRNGKeyArray,
    ):
        self.family, self.start = family, start
        self.operator = FourierOperator(
            6,
            outputs,
            width=width,
            modes=(min(modes, 4), modes, modes),
            layers=layers,
            hidden=hidden,
            padding=(4, 0, 0),
            gain=0.1 if start else 1.0,
            key=key,
        )

    def __call__(self, flow: Flow) -> Float[Array, "n t x y"]:
        features = self.family.features(flow)
        fields = self.operator(features)
        t = jnp.asarray(self.family.t / self.family.duration)[None, :, None, None]
        if self.start:
            early = jnp.concatenate([features[:3], t * features[:3]])[: len(fields)]
            waves = jnp.asarray(_lowest(self.family.n, len(fields) - len(early)))[:, None]
            waves = jnp.broadcast_to(waves, (len(waves), *self.family.grid))
            fields = fields + jnp.concatenate([early, waves])
        return t * (fields - jnp.mean(fields, axis=(2, 3), keepdims=True))


def _lowest(n: int, count: int) -> Float[np.ndarray, "count n n"]:
    """Cosines and sines of lowest frequency on n x n points, without the constant."""
    most = math.ceil(math.sqrt(count)) + 1
    pairs = [(k, m) for k in range(-most, most + 1) for m in range(most + 1) if m > 0 or k > 0]
    pairs.sort(key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    k = np.array(pairs[: -(-count // 2)], int).reshape(-1, 2)
    x = 2 * np.pi * np.arange(n) / n
    angle = k[:, 0, None, None] * x[None, :, None] + k[:, 1, None, None] * x[None, None]
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).reshape(-1, n, n)[:count]
