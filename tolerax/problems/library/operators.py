"""A small Fourier neural operator, and differences on regular grids."""

import functools
import itertools
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


class FourierLayer(eqx.Module):
    """`gelu(W v + K v)`, W the same at each point and K diagonal in frequency, on the lowest modes.

    `low`: real and imaginary parts of K, one block for each combination of signs.
    """

    low: Float[Array, "2 blocks width width *modes"]
    mix: Float[Array, "width width"]
    bias: Float[Array, " width"]
    modes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, width: int, modes: Sequence[int], key: PRNGKeyArray):
        one, two = jax.random.split(key)
        self.modes = tuple(modes)
        blocks = 2 ** (len(self.modes) - 1)
        shape = (2, blocks, width, width, *self.modes)
        self.low = jax.random.normal(one, shape) / width
        self.mix = jax.random.normal(two, (width, width)) / math.sqrt(width)
        self.bias = jnp.zeros(width)

    def __call__(self, v: Float[Array, "width *grid"]) -> Float[Array, "width *grid"]:
        grid = v.shape[1:]
        axes = tuple(range(1, v.ndim))
        hat = jnp.fft.rfftn(v, axes=axes)
        kernel = jax.lax.complex(self.low[0], self.low[1])
        out = jnp.zeros_like(hat)
        signs = itertools.product((False, True), repeat=len(self.modes) - 1)
        for block, sign in zip(kernel, signs, strict=True):
            where = [slice(-m, None) if s else slice(m) for m, s in zip(self.modes, sign)]  # noqa: B905
            where = (slice(None), *where, slice(self.modes[-1]))
            out = out.at[where].set(jnp.einsum("oi...,i...->o...", block, hat[where]))
        smooth = jnp.fft.irfftn(out, grid, axes=axes)
        mixed = jnp.einsum("oi,i...->o...", self.mix, v)
        return mixed + smooth + self.bias.reshape(-1, *[1] * len(grid))


class FourierOperator(eqx.Module):
    """A Fourier neural operator: from some fields on a regular grid to others, on any grid.

    - `inputs`, `outputs`: how many fields. `width`: channels within. `modes`: frequencies along
      each axis. `layers`: how many. `hidden`: functions that the outputs are made of, at every
      point (twice the width by default): no more outputs than that are independent.
    - `padding`: points of zeros added at the end of each axis, for fields that are not periodic.
    - `gain`: factor of the last matrix before training: small where outputs are added to something
      that they should not hide.

    Source: Li et al., *Fourier neural operator for parametric partial differential equations* (ICLR
    2021).

    >>> import jax, jax.numpy as jnp
    >>> network = FourierOperator(2, 3, width=4, modes=(3, 3), layers=1, key=jax.random.key(0))
    >>> network(jnp.ones((2, 16, 8))).shape
    (3, 16, 8)
    """

    lift: Float[Array, "width inputs"]
    layers: tuple[FourierLayer, ...]
    project: tuple[Float[Array, "wide width"], Float[Array, "outputs wide"]]
    padding: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int,
        modes: Sequence[int],
        layers: int,
        hidden: int | None = None,
        padding: Sequence[int] | None = None,
        gain: float = 1.0,
        key: PRNGKeyArray,
    ):
        first, one, two, *rest = jax.random.split(key, 3 + layers)
        self.lift = jax.random.normal(first, (width, inputs)) / math.sqrt(inputs)
        self.layers = tuple(FourierLayer(width, modes, k) for k in rest)
        wide = 2 * width if hidden is None else hidden
        self.project = (
            jax.random.normal(one, (wide, width)) / math.sqrt(width),
            jax.random.normal(two, (outputs, wide)) * (gain / math.sqrt(wide)),
        )
        self.padding = tuple(padding or [0] * len(tuple(modes)))

    def __call__(self, fields: Float[Array, "inputs *grid"]) -> Float[Array, "outputs *grid"]:
        grid = fields.shape[1:]
        v = jnp.einsum("oi,i...->o...", self.lift, fields)
        v = jnp.pad(v, [(0, 0), *[(0, p) for p in self.padding]])
        for k, layer in enumerate(self.layers):
            v = layer(v)
            v = jax.nn.gelu(v) if k < len(self.layers) - 1 else v
        v = v[(slice(None), *[slice(n) for n in grid])]
        v = jax.nn.gelu(jnp.einsum("oi,i...->o...", self.project[0], v))
        return jnp.einsum("oi,i...->o...", self.project[1], v)


def legendre_products(count: int, *axes: Array | np.ndarray) -> Float[np.ndarray, "count *grid"]:
    """Products of Legendre polynomials, one factor for each axis (points from 0 to 1), of lowest
    degrees: 4, 9, 16, ... of two axes have all pairs of degrees below 2, 3, 4, ...

    >>> legendre_products(4, np.linspace(0, 1, 5), np.zeros(1))[:, 4, 0].round(1).tolist()
    [1.0, -1.0, 1.0, -1.0]
    """
    degrees = range(math.ceil(count ** (1 / len(axes)) - 1e-9))
    order = sorted(itertools.product(degrees, repeat=len(axes)), key=lambda d: (max(d), sum(d), d))
    one = [
        np.polynomial.legendre.legvander(2 * np.asarray(x) - 1, len(degrees) - 1).T for x in axes
    ]
    return np.stack(
        [
            functools.reduce(np.multiply.outer, [P[k] for P, k in zip(one, chosen, strict=True)])
            for chosen in order[:count]
        ]
    )


def difference_matrix(n: int, spacing: float, derivative: int = 1, points: int = 5) -> np.ndarray:
    """The matrix of finite differences on n points in a row: weights of the `points` nearest ones
    that are exact for polynomials, one-sided at the ends.

    >>> D = difference_matrix(9, 0.5)
    >>> x = 0.5 * np.arange(9)
    >>> bool(np.allclose(D @ x**4, 4 * x**3))
    True
    """
    if not derivative < points <= n:
        raise ValueError(f"points is {points}: give more than {derivative} and at most {n}.")
    D = np.zeros((n, n))
    for i in range(n):
        first = min(max(i - points // 2, 0), n - points)
        offsets = np.arange(first, first + points) - i
        powers = offsets[None] ** np.arange(points)[:, None]
        right = np.zeros(points)
        right[derivative] = math.factorial(derivative)
        D[i, first : first + points] = np.linalg.solve(powers.astype(float), right)
    return D / spacing**derivative
