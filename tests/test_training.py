"""Training of layers: runs that resume to the bit, adaptive tolerances, bad data."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tolerax
from tolerax import Boxes, Equation, HardConstrained
from tolerax.checkpoint import Checkpoint, CheckpointError
from tolerax.training import Forcing, Trained, train

X = jnp.linspace(0, 1, 12)
RATES = jnp.linspace(0.5, 1.5, 6)
ADAM = optax.adam(0.2)


class Powers(eqx.Module):
    rate: jax.Array

    def __call__(self, a):
        return jnp.stack([X * jnp.exp(-self.rate * X), X**2])


EQUATION = Equation(
    lambda u: jnp.stack([u, jnp.gradient(u, X[1])]),
    lambda z, a: z[1] + a * z[0] ** 2,
    data=lambda a: a,
    lift=lambda a: jnp.ones(12),
)
LAYER = HardConstrained(Powers(jnp.array(6.0)), EQUATION, Boxes((12,), (1,)), points=10)
OPTIONS = {"steps": 12, "batch": 4, "key": jax.random.key(0)}


def run(inputs=RATES, **options) -> Trained:
    return train(LAYER, inputs, ADAM, **{**OPTIONS, **options})


def test_training_lowers_the_loss_and_loosens_what_it_may():
    adaptive, fixed = run(), run(forcing=Forcing.fixed(1e-8))
    for trained in (adaptive, fixed):
        assert trained.state.loss[-3:].mean() < 0.8 * trained.state.loss[:3].mean()
        assert not np.any(trained.state.failed)
    assert float(trained.layer.network.rate) != 6.0
    np.testing.assert_allclose(fixed.state.tolerance, 1e-8)
    assert np.all(adaptive.state.tolerance <= 1e-1)
    assert adaptive.state.evaluations.sum() < 0.8 * fixed.state.evaluations.sum()
    # The second epoch starts from what the first has left.
    assert fixed.state.evaluations[-6:].sum() < fixed.state.evaluations[:1].sum() * 6


def test_an_interrupted_run_arrives_at_the_same_bits(tmp_path):
    whole = run()

    def interrupt(state):
        if int(state.step) == 7:
            raise StopIteration

    saved = Checkpoint(tmp_path / "run", every_steps=5)
    part = run(checkpoint=saved, callback=interrupt)
    assert part.state.loss.shape == (7,)
    seen = []
    resumed = run(checkpoint=saved, progress=lambda step, **scalars: seen.append((step, scalars)))
    # What stops a run by StopIteration saves it, whether that is due or not.
    assert [step for step, _ in seen] == list(range(8, 13))
    assert {"value", "gradient", "tolerance"} <= set(seen[0][1])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    saved = Checkpoint(tmp_path / "run", every_steps=1)

    def interrupt(state):
        raise StopIteration

    run(checkpoint=saved, callback=interrupt)
    other = eqx.tree_at(lambda layer: layer.ridge, LAYER, 1e-3)
    with pytest.raises(CheckpointError, match="training"):
        train(other, RATES, ADAM, **OPTIONS, checkpoint=saved)
    with pytest.raises(CheckpointError, match="training"):
        run(RATES + 0.1, checkpoint=saved)


def test_a_sample_that_is_no_number_counts_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        trained = run(RATES.at[2].set(jnp.nan))
    assert np.all(np.isfinite(trained.state.loss))
    assert np.isfinite(trained.layer.network.rate)
    # One lane, in every batch that the sample is in; steps that it would spoil are left out.
    assert trained.state.failed.max() == 1
    assert trained.state.skipped.sum() == sum("left out" in r.message for r in caplog.records)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="batch is 7"):
        run(batch=7)
    with pytest.raises(ValueError, match="floor is"):
        Forcing(1e-9)
    with pytest.raises(ValueError, match="loss returned shape"):
        run(loss=lambda field, inputs: jnp.sum(field.u))
    assert isinstance(tolerax.train, type(train))
