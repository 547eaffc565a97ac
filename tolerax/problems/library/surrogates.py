"""Optimization over trained networks: a mixture of images, a counterfactual, a reactor."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tolerax.problems.library.base import check_count, generator
from tolerax.problems.library.trained import (
    Autoencoder,
    Classifier,
    digit_images,
    train,
    trained_autoencoder,
    trained_classifier,
)
from tolerax.problems.surrogate import NeuralSurrogate


class LibrarySurrogate(eqx.Module):
    """A ready-made problem over a trained network.

    - `problem`: the [`tolerax.NeuralSurrogate`][]; `x0`: where its benchmark starts.
    - `description`: data, network and objective, in a few lines.
    - `optimum`: the optimal value where it is known, else `None`.
    - `image`: for problems with pictures, x -> image; `original`: the picture that it is about.
    """

    problem: NeuralSurrogate
    x0: Array
    description: str = eqx.field(static=True)
    optimum: float | None = eqx.field(static=True, default=None)
    image: Callable | None = None
    original: Array | None = None


def _split(seed: int) -> tuple[Array, Array, np.random.Generator]:
    """Digits and labels in the order of a seed, and a generator for more."""
    random = generator(seed, "surrogates")
    images, labels = digit_images()
    order = random.permutation(len(labels))
    return images[order], labels[order], random


class Mixture(eqx.Module):
    """Weights -> the mixture of images, by softmax."""

    images: Float[Array, "n 8 8"]

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, "8 8"]:
        return jnp.tensordot(jax.nn.softmax(x).astype(self.images.dtype), self.images, 1)


class ClassOfMixture(eqx.Module):
    """Weights -> the classifier's probabilities for the mixture."""

    mixture: Mixture
    classifier: Classifier

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, "10"]:
        return jax.nn.softmax(self.classifier(self.mixture(x)))


class ToTarget(eqx.Module):
    """Squared distance of the output from a target."""

    target: Array

    def __call__(self, z: Array, x: Array) -> Float[Array, ""]:
        del x
        return jnp.sum((z - self.target) ** 2)


def image_mixture(n: int = 100, *, seed: int = 0, steps: int = 600) -> LibrarySurrogate:
    """Mix n images of digits so that a classifier says of the mixture what it says of one of them.

    x are the logits of the weights, within [-10, 10]; the objective is the squared distance between
    the two vectors of ten probabilities, whose optimum is 0 up to the weight, below 1e-6, that the
    other images keep. The run starts from equal weights.

    - `n`: images, and variables. - `seed`: draws split, target and training.
    - `steps`: training steps of the classifier.

    Source: problem A of Bouchet, Vidal, *Optimization by directional attacks* (arXiv 2510.01461),
    there with ResNet18; here with a convolutional network for 8 x 8 digits.
    """
    n = check_count("n", n, 2, 500)
    images, labels, random = _split(seed)
    key = jax.random.key(int(random.integers(2**31)))
    classifier = trained_classifier(images[500:], labels[500:], key, check_count("steps", steps, 1))
    chosen = images[:n]
    network = ClassOfMixture(Mixture(chosen), classifier)
    # Of the images that are not what the start already looks like, the first.
    said = np.asarray(jnp.argmax(jax.vmap(classifier)(chosen), axis=1))
    start = int(jnp.argmax(network(jnp.zeros(n))))
    target = int(np.flatnonzero(said != start)[0])
    goal = ToTarget(jax.nn.softmax(classifier(chosen[target])))
    return LibrarySurrogate(
        NeuralSurrogate(network, goal, bounds=(-10.0, 10.0)),
        jnp.zeros(n),
        f"Mixture of {n} digits that a classifier takes for a {said[target]}, seed {seed}.",
        0.0,
        Mixture(chosen),
        chosen[target],
    )


class ClassOfLatent(eqx.Module):
    """Latent variables -> the classifier's logits for their image."""

    autoencoder: Autoencoder
    classifier: Classifier

    def image(self, x: Float[Array, " n"]) -> Float[Array, "8 8"]:
        """The image of latent variables."""
        return self.autoencoder.decode(x.astype(jnp.float32))

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, "10"]:
        return self.classifier(self.image(x))


class Margin(eqx.Module):
    """How far the logit of a class is below the largest other one plus a margin; and how far the
    norm of x is outside the shell where a normal sample lies."""

    # An array, so that problems of other seeds are not compiled again.
    wanted: Int[Array, ""]
    margin: float = eqx.field(static=True)

    def __call__(self, z: Float[Array, "10"], x: Float[Array, " n"]) -> dict[str, Array]:
        others = jnp.max(jnp.where(jnp.arange(z.size) == self.wanted, -jnp.inf, z))
        norm = jnp.sqrt(jnp.sum(x**2) + jnp.finfo(x.dtype).tiny)
        return {
            "class": others + self.margin - z[self.wanted],
            "shell": jnp.abs(norm - jnp.sqrt(x.size)) - 1.0,
        }


class Near(eqx.Module):
    """Squared distance of x from where it started."""

    start: Array

    def __call__(self, z: Array, x: Array) -> Float[Array, ""]:
        del z
        return jnp.sum((x - self.start) ** 2)


def digits_counterfactual(
    n: int = 64, *, seed: int = 0, steps: int = 2000, margin: float = 1.0
) -> LibrarySurrogate:
    """The smallest change of a digit's latent variables that makes a classifier take it for another
    digit: a counterfactual explanation.

    x are the n latent variables of a variational autoencoder. The logit of the wanted class must
    exceed every other one by `margin`, and the norm of x lie within 1 of the root of n, where
    samples of the prior lie. The start is a sample of the posterior of the image, moved to the
    shell; it is feasible but for the class.

    - `seed`: draws split, image and training; `steps`: training steps of the autoencoder (the
      classifier takes a third).

    Source: problem B of Bouchet, Vidal (arXiv 2510.01461) has the same shape, over maps of a game.
    """
    n = check_count("n", n, 2, 256)
    images, labels, random = _split(seed)
    keys = jax.random.split(jax.random.key(int(random.integers(2**31))), 3)
    steps = check_count("steps", steps, 3)
    classifier = trained_classifier(images[500:], labels[500:], keys[0], steps // 3)
    autoencoder = trained_autoencoder(images[500:], n, keys[1], steps)
    network = ClassOfLatent(autoencoder, classifier)
    mean, log_deviation = autoencoder.encode(images[0])
    x0 = mean + jnp.exp(log_deviation) * jax.random.normal(keys[2], (n,), mean.dtype)
    x0 = jnp.asarray(x0 * jnp.sqrt(n) / jnp.linalg.norm(x0), float)
    logits = network(x0)
    said = int(jnp.argmax(logits))
    wanted = int(jnp.argsort(logits)[-2])  # the runner-up
    return LibrarySurrogate(
        NeuralSurrogate(network, Near(x0), constraints=Margin(jnp.array(wanted), margin)),
        x0,
        f"The nearest latent variables of a {said} that a classifier takes for a {wanted}, of {n}, "
        f"seed {seed}.",
        None,
        network.image,
        network.image(x0),
    )


# -- a reactor ------------------------------------------------------------------------------------

TIMES = 20  # outputs in time
COOLANT = (290.0, 350.0)  # K
DURATION = (0.5, 6.0)  # h
HOTTEST = 370.0  # K


def _rates(t: Array, y: Array, args: tuple[Array, Array]) -> Array:
    """Time derivatives, with the duration as the unit of time. A function of its own, so that it is
    compiled once for all calls."""
    del t
    coolant, duration = args
    a, b, _, temperature = y
    inverse = 1 / 320.0 - 1 / temperature
    one = jnp.exp(70e3 / 8.314 * inverse) * a
    two = 0.05 * jnp.exp(110e3 / 8.314 * inverse) * b
    heat = 30 * (one + 0.8 * two) - 4 * (temperature - coolant)
    return duration * jnp.stack([-one, one - two, two, heat])


class Reactor(eqx.Module):
    """A batch reactor with A -> B -> C, both exothermic, behind a cooled wall.

    x in [0, 1]^2 is the temperature of the coolant from 290 to 350 K and the duration of the batch
    from 0.5 to 6 h. The output has rows cA, cB, cC (mol/L) and T (K) at 20 equal times.

        cA' = -k1 cA,   cB' = k1 cA - k2 cB,   cC' = k2 cB,
        T' = 30 (k1 cA + 0.8 k2 cB) - 4 (T - Tc),   k = k0 exp(-E / (R T))

    with k1 = 1 /h and k2 = 0.05 /h at 320 K, and activation energies of 70 and 110 kJ/mol. The
    values are typical of such reactors, not of one substance.
    """

    def controls(self, x: Float[Array, "2"]) -> tuple[Array, Array]:
        """Coolant (K) and duration (h)."""
        return (
            COOLANT[0] + (COOLANT[1] - COOLANT[0]) * x[0],
            DURATION[0] + (DURATION[1] - DURATION[0]) * x[1],
        )

    def __call__(self, x: Float[Array | np.ndarray, "2"]) -> Float[Array, "4 20"]:
        """The trajectory, by an implicit method (Kvaerno's of order 5) to a relative 1e-8."""
        import diffrax

        coolant, duration = self.controls(jnp.asarray(x, float))

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_rates),  # pyright: ignore[reportArgumentType]
            diffrax.Kvaerno5(),
            0.0,
            1.0,
            1e-3,
            jnp.stack([jnp.array(2.0), jnp.array(0.0), jnp.array(0.0), coolant]),
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, TIMES + 1)[1:]),
            args=(coolant, duration),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
            max_steps=10_000,
        )
        assert solution.ys is not None
        return solution.ys.T

    def productivity(self, z: Float[Array, "4 20"], x: Float[Array, "2"]) -> Float[Array, ""]:
        """Moles of B a litre and hour, with an hour between batches."""
        return z[1, -1] / (self.controls(x)[1] + 1.0)

    def limits(self, z: Float[Array, "4 20"], x: Float[Array, "2"]) -> dict[str, Array]:
        """No hotter than 370 K at any time; at least 80 % of the A used up; at most a tenth as much
        C as B."""
        del x
        return {
            "temperature": (z[3] - HOTTEST) / 10.0,
            "conversion": z[0, -1] - 0.4,
            "purity": z[2, -1] - 0.1 * z[1, -1],
        }


class ScaledMLP(eqx.Module):
    """A dense network whose outputs are shifted and scaled."""

    mlp: eqx.nn.MLP
    mean: Float[Array, "4 20"]
    scale: Float[Array, "4 20"]

    def __call__(self, x: Float[Array, "2"]) -> Float[Array, "4 20"]:
        return self.mean + self.scale * self.mlp(2 * x - 1).reshape(4, TIMES)


def reactor(*, seed: int = 0, samples: int = 400, steps: int = 4000) -> LibrarySurrogate:
    """Coolant and duration of a batch reactor for the most product an hour, over a network that was
    trained on solutions of its kinetics, with limits on the way: see [`Reactor`][].

    The simulator of the problem solves the kinetics, so that `problem.recheck` compares.

    - `seed`: draws the samples and the training; `samples`: solutions to train on; `steps`:
      training steps.

    >>> from tolerax.problems.library import reactor
    >>> reactor(samples=20, steps=10).x0
    Array([0.5, 0.5], dtype=float64)
    """
    random = generator(seed, "reactor")
    samples = check_count("samples", samples, 2)
    x = jnp.asarray(random.random((samples, 2)))
    simulator = Reactor()
    z = jax.jit(jax.vmap(simulator))(x)
    mean, scale = jnp.mean(z, axis=0), jnp.std(z, axis=0)
    begin, key = jax.random.split(jax.random.key(int(random.integers(2**31))))
    mlp = eqx.nn.MLP(2, 4 * TIMES, 64, 3, jnp.tanh, key=begin)

    def loss(mlp: eqx.nn.MLP, items: tuple, key: Any) -> Float[Array, ""]:
        del key
        x, z = items
        return jnp.mean((jax.vmap(mlp)(2 * x - 1) - z) ** 2)

    scaled = ((z - mean[None]) / scale[None]).reshape(samples, -1)
    mlp = train(mlp, loss, (x, scaled), key=key, steps=check_count("steps", steps, 1), rate=5e-3)
    mlp = jax.tree.map(lambda a: a.astype(float) if eqx.is_inexact_array(a) else a, mlp)
    problem = NeuralSurrogate(
        ScaledMLP(mlp, mean, scale),
        simulator.productivity,
        constraints=simulator.limits,
        maximize=True,
        bounds=(0.0, 1.0),
        simulator=simulator,
    )
    return LibrarySurrogate(
        problem,
        jnp.array([0.5, 0.5]),
        f"Productivity of a batch reactor over a network trained on {samples} solutions, seed "
        f"{seed}.",
    )
