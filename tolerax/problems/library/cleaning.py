"""P4: find wrong labels by learning one weight for each training sample."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float

from tolerax.problems.bilevel import CrossBounds
from tolerax.problems.constants import proved
from tolerax.problems.library.base import LibraryProblem, assemble, check_real, generator
from tolerax.problems.library.digits import (
    DigitsSplit,
    RangeOfLogits,
    Samples,
    ValidationLoss,
    digits_split,
)

Weights = Float[Array, "features classes"]
Scores = Float[Array, " samples"]


class WeightedLoss(eqx.Module):
    """(1/n) Σ σ(xᵢ) ℓᵢ(y) + ½ ridge ‖y‖², with σ the logistic function."""

    samples: Samples
    ridge: Float[Array, ""]

    def __call__(self, y: Weights, x: Scores) -> Float[Array, ""]:
        loss = jnp.mean(jax.nn.sigmoid(x) * self.samples.losses(y))
        return loss + 0.5 * self.ridge * jnp.sum(y**2)


class CleaningCross(eqx.Module):
    """Bounds on the cross derivative of [`WeightedLoss`][].

    Its rows are F_xᵀw = (cᵢ gᵢᵀWᵀaᵢ)ᵢ with cᵢ = σᵢ(1 − σᵢ)/n, p the softmax of Yᵀaᵢ, k the label
    and gᵢ = p − e_k. The Hessian is H = ridge I + (1/n) Σ σᵢ aᵢaᵢᵀ ⊗ Sᵢ with Sᵢ = diag p − ppᵀ, and

        (gᵢᵀt)² ≤ (1 − p_k)/p_k tᵀSᵢt     (variance ≥ that between k and the other classes)
        (gᵢᵀt)² ≤ ‖gᵢ‖² ‖t‖².

    - `adjoint`: use the first where it costs less than a threshold τ², the second, with
      ridge I ≤ H, elsewhere: F_xF_xᵀ ≤ max(τ², λ_max(Σ cᵢ²‖gᵢ‖² aᵢaᵢᵀ)/ridge) H. Take the best τ.
    - `state`: d/dy[F_xᵀq] e = (cᵢ Cov(Qᵀaᵢ, Eᵀaᵢ))ᵢ, and Cov² ≤ Var Var, the second part of H.
    - `both`: Cov ≤ ½‖Eᵀaᵢ‖‖Wᵀaᵢ‖ whatever p, then ridge I ≤ H twice.
    - `third`: the change of that covariance along V is a third cumulant, at most M‖V‖ times both
      standard deviations, and cᵢ² = (1 − σᵢ)² (σᵢ/n)²: max (1 − σᵢ).
    """

    samples: Samples
    ridge: Float[Array, ""]

    def __call__(self, y: Weights, q: Weights, x: Scores) -> CrossBounds:
        a, n = self.samples.features, self.samples.features.shape[0]
        weight, rest = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)
        c = weight * rest / n
        norms = jnp.sum(a**2, axis=1)
        p = jax.nn.softmax(self.samples.logits(y), axis=1)
        g = p - self.samples.targets
        # 1 - p_k as the sum of the others: it is not lost to rounding where p_k is almost 1.
        wrong = jnp.sum(p * (1 - self.samples.targets), axis=1)
        right = jnp.sum(p * self.samples.targets, axis=1)
        by_variance = weight * rest**2 / n * wrong / right
        by_ridge = c**2 * jnp.sum(g**2, axis=1)

        def bound(tau2: Float[Array, ""]) -> Float[Array, ""]:
            left = jnp.where(by_variance <= tau2, 0.0, by_ridge)
            return jnp.maximum(tau2, largest_eigenvalue((a * left[:, None]).T @ a) / self.ridge)

        # `right` may underflow: such a bound is infinite and never among the finite thresholds.
        largest = jnp.max(jnp.where(jnp.isfinite(by_variance), by_variance, 0.0))
        thresholds = largest * 2.0 ** -jnp.arange(16.0, dtype=x.dtype)
        s = a @ q
        variance = jnp.sum(p * (s - jnp.sum(p * s, axis=1, keepdims=True)) ** 2, axis=1)
        pairs = largest_eigenvalue((a * (c**2 * norms)[:, None]).T @ a)
        return CrossBounds(
            adjoint=jnp.sqrt(jnp.min(jax.lax.map(bound, thresholds))),
            state=jnp.sqrt(jnp.max(weight * rest**2 * variance) / n),
            both=0.5 * jnp.sqrt(pairs) / self.ridge,
            third=jnp.max(rest),
        )


def largest_eigenvalue(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    """The largest eigenvalue of a positive semidefinite matrix, with room for rounding."""
    margin = 10 * matrix.shape[0] * jnp.finfo(matrix.dtype).eps
    return jnp.linalg.eigvalsh(matrix)[-1] * (1 + margin)


class HyperCleaning(LibraryProblem):
    """What [`hyper_cleaning`][] returns. `accuracy` and `test_loss` are on clean test samples."""

    data: DigitsSplit
    flipped: Bool[Array, " samples"]

    def accuracy(self, y: Weights) -> Float[Array, ""]:
        """Share of the test samples that weights y classify rightly."""
        return self.data.test.accuracy(y)

    def test_loss(self, y: Weights) -> Float[Array, ""]:
        """Mean cross-entropy of the test samples, in nats."""
        return self.data.test.loss(y)

    def flip_f1(self, x: Scores) -> Float[Array, ""]:
        """F1 score of "label i is wrong" when weights σ(xᵢ) below ½ are taken to say so."""
        flagged = x < 0
        hits = jnp.sum(flagged & self.flipped)
        return 2.0 * hits / jnp.maximum(jnp.sum(flagged) + jnp.sum(self.flipped), 1)


def hyper_cleaning(
    seed: int = 0,
    flipped: float = 0.4,
    *,
    ridge: float = 1e-3,
    dtype: DTypeLike = float,
    **options: Any,
) -> HyperCleaning:
    """Learn a weight σ(xᵢ) for each training digit, a share `flipped` of which is labelled wrongly.

    Lower level: (1/n) Σ σ(xᵢ) ℓᵢ(y) + ½ ridge ‖y‖² over softmax weights y of shape (64, 10); upper
    level: mean loss on clean validation samples; start x = 0. The wrong label is uniform among the
    other nine. Splits as in [`tolerax.problems.library.digits_penalties`][]; `seed` draws split
    and flips. Data hyper-cleaning is from Franceschi et al. (*Forward and reverse gradient-based
    hyperparameter optimization*, ICML 2017). `options` are passed on to
    [`tolerax.problems.Bilevel`][]. Every constant is proved. A preconditioner of rank 32 is learned
    (`recycle`).

    >>> p = hyper_cleaning(seed=0, flipped=0.4)
    >>> p.x0.shape, int(p.flipped.sum())
    ((963,), 385)
    >>> float(p.flip_f1(jnp.where(p.flipped, -1.0, 1.0)))
    1.0
    """
    flipped = check_real("flipped", flipped, 0.0, 1.0)
    ridge = check_real("ridge", ridge, float(jnp.finfo(dtype).eps))
    recycle = 0 if "preconditioner" in options else 32
    options = {"recycle": recycle} | options
    data = digits_split(seed, dtype=dtype)
    n = data.train.features.shape[0]
    rng = generator(seed, "flips")
    wrong = np.zeros(n, bool)
    wrong[rng.permutation(n)[: round(flipped * n)]] = True
    labels = np.argmax(data.train.targets, axis=1)
    labels = np.where(wrong, (labels + rng.integers(1, 10, size=n)) % 10, labels)
    data = eqx.tree_at(
        lambda split: split.train.targets, data, jnp.asarray(np.eye(10)[labels], dtype)
    )
    strength = jnp.asarray(ridge, dtype)
    levels = assemble(
        ValidationLoss(data.validation),
        WeightedLoss(data.train, strength),
        jnp.zeros((64, 10), dtype),
        options,
        strong_convexity=proved(strength, because="the weighted losses are convex"),
        self_concordance=proved(
            data.train.self_concordance(), because="third cumulant <= range of logits * variance"
        ),
        self_concordance_along=proved(
            RangeOfLogits(data.train), because="third cumulant <= range of logits * variance"
        ),
        upper_smoothness=proved(
            data.validation.smoothness(), because="diag p - pp' <= I/2, and the singular values"
        ),
        cross=proved(
            CleaningCross(data.train, strength),
            because="variances in H dominate the rows of F_x, or the ridge does",
        ),
    )
    return HyperCleaning(
        **levels,
        x0=jnp.zeros(n, dtype),
        description=(
            f"Digits, hyper-cleaning: {n} training samples, {wrong.sum()} of them with a wrong "
            f"label, {data.validation.features.shape[0]} clean validation and "
            f"{data.test.features.shape[0]} test samples, ridge {ridge:g}, seed {seed}. Both "
            "levels are mean losses in nats. All constants proved."
        ),
        data=data,
        flipped=jnp.asarray(wrong),
    )
