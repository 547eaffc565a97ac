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
        return jnp.stack([X * jnp.exp(-self.rate * a * X), X**2])


EQUATION = Equation(
    lambda u: jnp.stack([u, jnp.gradient(u, X[1])]),
    lambda z, a: z[1] + a * z[0] ** 2,
    data=lambda a: a,
    lift=lambda a: jnp.ones(12),
)
LAYER = HardConstrained(Powers(jnp.array(3.0)), EQUATION, Boxes((12,), (1,)), points=10)
# As an array, so that one program serves any number.
LAYER = eqx.tree_at(lambda layer: layer.solver.max_steps, LAYER, jnp.array(200))
OPTIONS = {"steps": 12, "batch": 4, "key": jax.random.key(0)}


def run(inputs=RATES, layer=LAYER, optimizer=ADAM, **options) -> Trained:
    return train(layer, inputs, optimizer, **{**OPTIONS, **options})


def test_training_lowers_the_loss_and_loosens_what_it_may():
    adaptive, fixed = run(), run(forcing=Forcing.fixed(1e-8))
    for trained in (adaptive, fixed):
        assert trained.state.loss[-3:].mean() < 0.8 * trained.state.loss[:3].mean()
        assert not np.any(trained.state.failed)
        assert not np.any(trained.state.inaccurate)
    assert float(trained.layer.network.rate) != 3.0
    np.testing.assert_allclose(fixed.state.tolerance, 1e-8)
    # The tolerance falls with the averaged gradient.
    norms = adaptive.state.gradient
    sizes = [norms[0]]
    for norm in norms[1:-1]:
        sizes.append(0.9 * sizes[-1] + 0.1 * norm)
    wanted = 0.1 * np.minimum(np.array([norms[0], *sizes]) / norms[0], 1)
    np.testing.assert_allclose(adaptive.state.tolerance, wanted, rtol=1e-12)
    assert adaptive.state.tolerance[-1] < 0.09
    assert adaptive.state.evaluations.sum() < 0.8 * fixed.state.evaluations.sum()
    # The second epoch starts from what the first has left.
    assert fixed.state.evaluations[-6:].sum() < fixed.state.evaluations[:1].sum() * 6


def test_a_tolerance_follows_the_gradient_between_its_ends():
    forcing = Forcing(1e-2, 2.0, 1e-5)
    sizes = jnp.array([2.0, 1.0, 0.1, 1e-3, 0.0])
    found = [float(forcing(size, jnp.array(1.0))) for size in sizes]
    np.testing.assert_allclose(found, [1e-2, 1e-2, 1e-4, 1e-5, 1e-5], rtol=1e-12)


def test_an_interrupted_run_arrives_at_the_same_bits(tmp_path):
    whole = run()

    def interrupt(state):
        if int(state.step) == 7:
            raise StopIteration

    saved = Checkpoint(tmp_path / "run", every_steps=5)
    part = run(checkpoint=tmp_path / "run", callback=interrupt)  # a path will do
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
    ridge = eqx.tree_at(lambda layer: layer.ridge, LAYER, 1e-3)
    network = eqx.tree_at(lambda layer: layer.network.rate, LAYER, jnp.array(5.0))
    for other in (
        {"layer": ridge},
        {"layer": network},
        {"optimizer": optax.adam(1e-4)},
        {"inputs": RATES + 0.1},
    ):
        with pytest.raises(CheckpointError, match="training"):
            run(**other, checkpoint=saved)
    with pytest.raises(CheckpointError, match="has steps: 12, this run needs 13"):
        run(steps=13, checkpoint=saved)


# One whose input is no number, and one for which the network overflows.
@pytest.mark.parametrize("bad", [jnp.nan, -1e4])
def test_a_sample_that_is_no_number_counts_nothing(bad):
    trained = run(RATES.at[2].set(bad))
    # One lane, in every batch that the sample is in, and no step is lost.
    assert trained.state.failed.max() == 1
    assert 6 <= trained.state.failed.sum() < 12
    assert not np.any(trained.state.skipped)
    assert trained.state.loss[-3:].mean() < 0.8 * trained.state.loss[:3].mean()
    assert not np.any(trained.state.warm.w[2])


def test_steps_without_a_finite_sample_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        trained = run(jnp.full_like(RATES, jnp.nan))
    assert np.all(trained.state.skipped == 1)
    assert np.all(np.isnan(trained.state.loss))
    assert float(trained.layer.network.rate) == 3.0
    assert sum("left out" in record.message for record in caplog.records) == 12


def test_lanes_that_do_not_converge_are_counted(caplog):
    hasty = eqx.tree_at(lambda layer: layer.solver.max_steps, LAYER, jnp.array(1))
    with caplog.at_level(logging.WARNING):
        trained = run(layer=hasty, forcing=Forcing.fixed(1e-8))
    assert np.all(trained.state.inaccurate > 0)
    assert not np.any(trained.state.failed)
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "4 lanes did not reach the tolerance 1.0e-08" in said[0]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="batch is 7"):
        run(batch=7)
    with pytest.raises(ValueError, match="floor is"):
        Forcing(1e-9)
    with pytest.raises(ValueError, match="loss returned shape"):
        run(loss=lambda field, inputs: jnp.sum(field.u))
    assert isinstance(tolerax.train, type(train))
