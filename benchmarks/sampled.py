"""The library's P1 and P4 as sums over samples, for methods that take minibatches."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from benchmarks.soba import Level
from tolerax.problems.library.cleaning import HyperCleaning, WeightedLoss
from tolerax.problems.library.digits import Samples
from tolerax.problems.library.penalties import DigitsPenalties

Weights = Float[Array, "features classes"]


class Losses(eqx.Module):
    """Cross-entropy of some samples; `weighted` multiplies each by sigmoid(x_i)."""

    samples: Samples
    weighted: bool = False

    def __call__(self, y: Weights, x: PyTree, indices: Int[Array, " k"]) -> Float[Array, " k"]:
        losses = Samples(self.samples.features[indices], self.samples.targets[indices]).losses(y)
        return jax.nn.sigmoid(x[indices]) * losses if self.weighted else losses


class Nothing(eqx.Module):
    """A level without a part of its own."""

    def __call__(self, y: Weights, x: PyTree) -> Float[Array, ""]:
        return jnp.zeros((), y.dtype)


class Penalty(eqx.Module):
    """sum exp(x_i) y_i^2 / 2."""

    def __call__(self, y: Weights, x: Weights) -> Float[Array, ""]:
        return 0.5 * jnp.sum(jnp.exp(x) * y**2)


class Ridge(eqx.Module):
    """ridge |y|^2 / 2."""

    ridge: Float[Array, ""]

    def __call__(self, y: Weights, x: PyTree) -> Float[Array, ""]:
        return 0.5 * self.ridge * jnp.sum(y**2)


class Levels(NamedTuple):
    """Both levels of a problem as sums over samples."""

    upper: Level
    lower: Level


def mean_over(
    samples: Samples, rest: Callable[[PyTree, PyTree], Array], weighted: bool = False
) -> Level:
    """A mean loss plus what does not depend on the samples."""
    count = samples.features.shape[0]
    return Level(Losses(samples, weighted), rest, count, 1 / count)


def levels(ready: DigitsPenalties | HyperCleaning) -> Levels:
    """Upper and lower level of P1 or P4."""
    upper = mean_over(ready.data.validation, Nothing())
    if isinstance(ready, DigitsPenalties):
        return Levels(upper, mean_over(ready.data.train, Penalty()))
    lower = ready.problem.oracle.potential
    assert isinstance(lower, WeightedLoss)
    return Levels(upper, mean_over(ready.data.train, Ridge(lower.ridge), weighted=True))
