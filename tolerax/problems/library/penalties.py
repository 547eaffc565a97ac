"""P1: one penalty for each of the 640 weights of a digit classifier."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from tolerax.problems.bilevel import CrossBounds
from tolerax.problems.constants import proved
from tolerax.problems.library.base import LibraryProblem, assemble
from tolerax.problems.library.digits import (
    DigitsSplit,
    RangeOfLogits,
    Samples,
    ValidationLoss,
    digits_split,
)

Weights = Float[Array, "features classes"]


class PenalizedLoss(eqx.Module):
    """Mean training loss + ½ Σ exp(xᵢ) yᵢ²."""

    samples: Samples

    def __call__(self, y: Weights, x: Weights) -> Float[Array, ""]:
        return self.samples.loss(y) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def penalties(x: Weights) -> Weights:
    """D = diag(exp x): the part of the lower-level Hessian that does not depend on the data."""
    return jnp.exp(x)


def penalty_cross(y: Weights, q: Weights, x: Weights) -> CrossBounds:
    """Bounds on the cross derivative F_x = diag(exp(x) y), from D ≤ H.

    F_xᵀw = Dyw = (√D y)(√D w) entry by entry, and ‖√D w‖ ≤ ‖w‖_H; likewise with q for y, as
    d/dy[F_xᵀq] e = Dqe, and with e for y, where |√D e| ≤ ‖e‖_H gives 1.
    """
    root = jnp.exp(0.5 * x)
    return CrossBounds(
        adjoint=jnp.max(jnp.abs(root * y)),
        state=jnp.max(jnp.abs(root * q)),
        both=jnp.ones((), x.dtype),
    )


class DigitsPenalties(LibraryProblem):
    """What [`digits_penalties`][] returns. `accuracy` and `test_loss` are on held-out samples."""

    data: DigitsSplit

    def accuracy(self, y: Weights) -> Float[Array, ""]:
        """Share of the test samples that weights y classify rightly."""
        return self.data.test.accuracy(y)

    def test_loss(self, y: Weights) -> Float[Array, ""]:
        """Mean cross-entropy of the test samples, in nats."""
        return self.data.test.loss(y)


def digits_penalties(
    seed: int = 0,
    *,
    prove_smoothness: bool = False,
    dtype: DTypeLike = float,
    **options: Any,
) -> DigitsPenalties:
    """Learn 640 log-penalties x of multinomial logistic regression from a validation set.

    Lower level: mean training loss + ½ Σ exp(xᵢ)yᵢ² over weights y of shape (64, 10), no intercept;
    upper level: mean validation loss; start x = −5. Pixels lie in [0, 1]; 20 % of the 1797 samples
    are held out for the test, the rest is split 67/33 by `seed`. It is the MNIST experiment of
    MAID (arXiv 2308.10098) at a size that needs no download. `options` are passed on to
    [`tolerax.problems.Bilevel`][].

    Proved: the diagonal lower bound exp(x) on the Hessian, self-concordance, the cross bounds.
    The smoothness of the upper level is estimated unless `prove_smoothness`: the proved Euclidean
    constant ½ σ_max(A)²/n is divided by min exp(x) when it is used, which becomes tiny as penalties
    are learned. Useful weights want no penalty at all, so that without bounds x runs to -inf:
    it is kept in [−12, 12] (HOAG's code keeps it in [−6, 6]). A preconditioner of rank 128 is
    learned (`recycle`), which saves products and makes bounds looser.

    >>> p = digits_penalties(seed=0)
    >>> p.x0.shape, p.data.train.features.shape, p.data.test.features.shape
    ((64, 10), (963, 64), (359, 64))
    """
    recycle = 0 if "preconditioner" in options else 128
    options = {"bounds": (-12.0, 12.0), "recycle": recycle} | options
    data = digits_split(seed, dtype=dtype)
    upper, lower = ValidationLoss(data.validation), PenalizedLoss(data.train)
    smoothness = None
    if prove_smoothness:
        smoothness = proved(
            data.validation.smoothness(), because="diag p - pp' <= I/2, and the singular values"
        )
    levels = assemble(
        upper,
        lower,
        jnp.zeros((64, 10), dtype),
        options,
        strong_convexity=proved(penalties, because="the loss is convex: H >= diag(exp x)"),
        self_concordance=proved(
            data.train.self_concordance(), because="third cumulant <= range of logits * variance"
        ),
        self_concordance_along=proved(
            RangeOfLogits(data.train), because="third cumulant <= range of logits * variance"
        ),
        upper_smoothness=smoothness,
        cross=proved(penalty_cross, because="diag(exp x) <= H, and F_x is diagonal"),
    )
    return DigitsPenalties(
        **levels,
        x0=jnp.full((64, 10), -5.0, dtype),
        description=(
            "Digits, 640 log-penalties: softmax regression of 8 x 8 pixels, "
            f"{data.train.features.shape[0]} training, {data.validation.features.shape[0]} "
            f"validation, {data.test.features.shape[0]} test samples, seed {seed}. Both levels are "
            "mean losses in nats. Strong convexity, self-concordance and cross bounds proved."
        ),
        data=data,
    )
