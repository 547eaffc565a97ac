"""Small networks for the handwritten digits of scikit-learn, trained here within seconds."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree


def train(
    network: PyTree,
    loss: Callable[[PyTree, PyTree, PRNGKeyArray], Float[Array, ""]],
    data: PyTree[Array],
    *,
    key: PRNGKeyArray,
    steps: int,
    batch: int = 128,
    rate: float = 2e-3,
) -> PyTree:
    """A network after so many steps of Adam on `loss(network, items, key)`, with a rate that falls
    to 0 along a cosine; in single precision, which convolutions on a CPU are fast in.

    - `data`: pytree of arrays with a leading axis over the items, of which each step draws `batch`.

    Source: Kingma, Ba, *Adam* (ICLR 2015), algorithm 1.
    """
    weights, static = eqx.partition(_single(network), eqx.is_inexact_array)
    data = _single(data)
    count = jax.tree.leaves(data)[0].shape[0]

    # It runs long, so that fast machine code pays even where code that compiles fast is asked for.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def run(weights: PyTree, data: PyTree, key: PRNGKeyArray) -> PyTree:
        def step(state: tuple, i: Int[Array, ""]) -> tuple[tuple, None]:
            w, m, v = state
            draw, noise = jax.random.split(jax.random.fold_in(key, i))
            items = jax.tree.map(lambda d: d[jax.random.randint(draw, (batch,), 0, count)], data)
            g = jax.grad(lambda w: loss(eqx.combine(w, static), items, noise))(w)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
            one, two = 1 - 0.9 ** (i + 1.0), 1 - 0.999 ** (i + 1.0)
            now = 0.5 * rate * (1 + jnp.cos(jnp.pi * i / steps))
            move = lambda w, m, v: w - now * (m / one) / (jnp.sqrt(v / two) + 1e-8)  # noqa: E731
            return (jax.tree.map(move, w, m, v), m, v), None

        nothing = jax.tree.map(jnp.zeros_like, weights)
        return jax.lax.scan(step, (weights, nothing, nothing), jnp.arange(steps))[0][0]

    return eqx.combine(run(weights, data, key), static)


def _single(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree)


def digit_images() -> tuple[Float[Array, "1797 8 8"], Int[Array, " 1797"]]:
    """All digits of scikit-learn, with values between 0 and 1, and which they are."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    loaded: Any = load_digits()
    return jnp.asarray(loaded.images / 16.0, jnp.float32), jnp.asarray(np.asarray(loaded.target))


class Classifier(eqx.Module):
    """A convolutional network, 8 x 8 image -> 10 logits."""

    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]
    dense: tuple[eqx.nn.Linear, eqx.nn.Linear]

    def __init__(self, key: PRNGKeyArray):
        one, two, three, four = jax.random.split(key, 4)
        self.convolutions = (
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=one),
            eqx.nn.Conv2d(16, 32, 3, padding=1, key=two),
        )
        self.dense = (eqx.nn.Linear(128, 64, key=three), eqx.nn.Linear(64, 10, key=four))

    def __call__(self, image: Float[Array, "8 8"]) -> Float[Array, "10"]:
        z = image[None]
        for convolution in self.convolutions:
            z = jax.nn.relu(convolution(z))
            z = jnp.max(z.reshape(z.shape[0], z.shape[1] // 2, 2, z.shape[2] // 2, 2), axis=(2, 4))
        return self.dense[1](jax.nn.relu(self.dense[0](z.ravel())))


def trained_classifier(
    images: Float[Array, "n 8 8"], labels: Int[Array, " n"], key: PRNGKeyArray, steps: int
) -> Classifier:
    """The classifier after training by cross-entropy."""
    begin, key = jax.random.split(key)

    def loss(network: Classifier, items: tuple, key: PRNGKeyArray) -> Float[Array, ""]:
        del key
        some, which = items
        z = jax.nn.log_softmax(jax.vmap(network)(some))
        return -jnp.mean(jnp.sum(z * jax.nn.one_hot(which, 10, dtype=z.dtype), axis=1))

    return train(Classifier(begin), loss, (images, labels), key=key, steps=steps)


class Autoencoder(eqx.Module):
    """A variational autoencoder of 8 x 8 images.

    Source: Kingma, Welling, *Auto-encoding variational Bayes* (ICLR 2014).
    """

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, latent: int, key: PRNGKeyArray):
        one, two = jax.random.split(key)
        self.encoder = eqx.nn.MLP(64, 2 * latent, 256, 1, key=one)
        self.decoder = eqx.nn.MLP(latent, 64, 256, 1, key=two)

    def encode(self, image: Float[Array, "8 8"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
        """Mean and logarithm of the standard deviation of the latent variables."""
        mean, log_deviation = jnp.split(self.encoder(image.ravel()), 2)
        return mean, log_deviation

    def decode(self, latent: Float[Array, " k"]) -> Float[Array, "8 8"]:
        """The image of latent variables."""
        return jax.nn.sigmoid(self.decoder(latent)).reshape(8, 8)


def trained_autoencoder(
    images: Float[Array, "n 8 8"], latent: int, key: PRNGKeyArray, steps: int
) -> Autoencoder:
    """The autoencoder after training by the evidence lower bound, with binary cross-entropy."""
    begin, key = jax.random.split(key)

    def one(network: Autoencoder, image: Float[Array, "8 8"], noise: Array) -> Float[Array, ""]:
        mean, log_deviation = network.encode(image)
        logits = network.decoder(mean + jnp.exp(log_deviation) * noise)
        pixels = image.ravel()
        fit = jnp.sum(jax.nn.softplus(logits) - pixels * logits)
        prior = 0.5 * (jnp.exp(2 * log_deviation) + mean**2 - 1) - log_deviation
        return fit + jnp.sum(prior)

    def loss(network: Autoencoder, some: Array, key: PRNGKeyArray) -> Float[Array, ""]:
        noise = jax.random.normal(key, (some.shape[0], latent), some.dtype)
        return jnp.mean(jax.vmap(lambda image, e: one(network, image, e))(some, noise))

    return train(Autoencoder(latent, begin), loss, images, key=key, steps=steps)
