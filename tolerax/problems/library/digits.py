"""The handwritten digits of scikit-learn, split, and their softmax regression."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from tolerax.problems.library.base import check_real, generator


class Samples(eqx.Module):
    """Labelled samples and the cross-entropy of the linear softmax classifier with weights y.

    - `features`: shape `(samples, features)`.
    - `targets`: shape `(samples, classes)`, one 1 in each row.
    """

    features: Float[Array, "samples features"]
    targets: Float[Array, "samples classes"]

    def logits(self, y: Float[Array, "features classes"]) -> Float[Array, "samples classes"]:
        """Row i is Yᵀaᵢ."""
        return self.features @ y

    def losses(self, y: Float[Array, "features classes"]) -> Float[Array, " samples"]:
        """Cross-entropy of each sample, in nats."""
        z = self.logits(y)
        # A product with the one-hot targets differentiates to products; a gather to scatters.
        return jax.nn.logsumexp(z, axis=1) - jnp.sum(self.targets * z, axis=1)

    def loss(self, y: Float[Array, "features classes"]) -> Float[Array, ""]:
        """Mean cross-entropy."""
        return jnp.mean(self.losses(y))

    def accuracy(self, y: Float[Array, "features classes"]) -> Float[Array, ""]:
        """Share of the samples whose largest logit is the right one."""
        right = jnp.argmax(self.logits(y), axis=1) == jnp.argmax(self.targets, axis=1)
        return jnp.mean(right.astype(self.features.dtype))

    def smoothness(self) -> Float[Array, ""]:
        """A Lipschitz constant of the gradient of `loss`.

        The Hessian is the mean of aᵢaᵢᵀ ⊗ (diag p − ppᵀ), and diag p − ppᵀ ≤ ½I: an eigenvalue is
        at most an absolute row sum, which is 2pₖ(1 − pₖ) ≤ ½.
        """
        largest = np.linalg.norm(np.asarray(self.features, np.float64), 2) ** 2
        return jnp.asarray(0.5 * largest / self.features.shape[0], self.features.dtype)

    def self_concordance(self) -> Float[Array, ""]:
        """M with |D³ℓᵢ[u, u, v]| ≤ M ‖v‖₂ D²ℓᵢ[u, u] for every sample's loss ℓᵢ: √2 maxᵢ ‖aᵢ‖₂.

        With s = Uᵀaᵢ, t = Vᵀaᵢ and K distributed as the softmax p, the derivatives of logsumexp are
        cumulants: D²ℓᵢ[u, u] = Var s_K and D³ℓᵢ[u, u, v] = E[(s_K − E s_K)²(t_K − E t_K)]. So the
        factor is at most max t − min t = max (v_k − v_l)ᵀaᵢ ≤ √2 ‖V‖ ‖aᵢ‖. The constant holds for
        every nonnegative combination of the ℓᵢ and any convex quadratic, as in a lower level.
        """
        return jnp.sqrt(2 * jnp.max(jnp.sum(self.features**2, axis=1)))

    def self_concordance_along(self, v: Float[Array, "features classes"]) -> Float[Array, ""]:
        """max t − min t of the proof above for the V at hand, the largest over the samples."""
        t = self.logits(v)
        return jnp.max(jnp.max(t, axis=1) - jnp.min(t, axis=1))


class RangeOfLogits(eqx.Module):
    """[`Samples.self_concordance_along`][] as a constant of a problem."""

    samples: Samples

    def __call__(self, v: Float[Array, "features classes"], x: Array) -> Float[Array, ""]:
        del x
        return self.samples.self_concordance_along(v)


class DigitsSplit(eqx.Module):
    """1797 pictures of 8 × 8 pixels in [0, 1], as training, validation and test samples."""

    train: Samples
    validation: Samples
    test: Samples


def digits_split(
    seed: int, validation: float = 0.33, test: float = 0.2, dtype: DTypeLike = float
) -> DigitsSplit:
    """The digits of scikit-learn (no download), shuffled by `seed`.

    The share `test` of all is held out, then the share `validation` of the rest.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: `pip install 'tolerax[examples]'`."
        ) from error
    validation = check_real("validation", validation, 0.05, 0.95)
    test = check_real("test", test, 0.05, 0.95)
    pixels, labels = load_digits(return_X_y=True)
    order = generator(seed, "split").permutation(len(labels))
    n_test = round(test * len(order))
    n_validation = round(validation * (len(order) - n_test))

    def samples(rows: np.ndarray) -> Samples:
        return Samples(
            jnp.asarray(pixels[rows] / 16, dtype), jnp.asarray(np.eye(10)[labels[rows]], dtype)
        )

    return DigitsSplit(
        train=samples(order[n_test + n_validation :]),
        validation=samples(order[n_test : n_test + n_validation]),
        test=samples(order[:n_test]),
    )


class ValidationLoss(eqx.Module):
    """The upper level of problems on digits: the mean loss on validation samples."""

    samples: Samples

    def __call__(self, y: Float[Array, "features classes"], x: Array) -> Float[Array, ""]:
        del x
        return self.samples.loss(y)
