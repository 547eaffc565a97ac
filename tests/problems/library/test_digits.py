"""Splits, label flips, scores and the softmax lemmas of the problems on digits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerax.problems.library import digits_penalties, hyper_cleaning
from tolerax.problems.library.digits import Samples, digits_split


@functools.cache
def cleaning():
    return hyper_cleaning(seed=2, flipped=0.4)


def rows(samples: Samples) -> list[bytes]:
    return [row.tobytes() for row in np.asarray(samples.features)]


def test_the_split_is_a_partition_of_the_1797_digits():
    from sklearn.datasets import load_digits

    split = digits_split(seed=4)
    parts = [rows(split.train), rows(split.validation), rows(split.test)]
    assert [len(part) for part in parts] == [963, 475, 359]
    pixels = np.asarray(load_digits(return_X_y=True)[0]) / 16
    assert sorted(itertools.chain(*parts)) == sorted(row.tobytes() for row in pixels)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_losses_are_the_cross_entropy():
    split = digits_split(seed=0)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(64, 10)))
    p = jax.nn.softmax(split.test.features @ y, axis=1)
    labels = jnp.argmax(split.test.targets, axis=1)
    expected = -jnp.log(p[jnp.arange(len(p)), labels])
    np.testing.assert_allclose(split.test.losses(y), expected, rtol=1e-10)
    zero = jnp.zeros((64, 10))
    np.testing.assert_allclose(split.test.loss(zero), np.log(10), rtol=1e-14)
    np.testing.assert_allclose(split.test.accuracy(y), jnp.mean(jnp.argmax(p, 1) == labels))


def test_penalties_learn_something_and_the_test_split_is_reported():
    p = digits_penalties(seed=1)
    y, gradient = p.y0, jax.jit(jax.grad(lambda y: p.lower(y, p.x0)))
    for _ in range(200):
        y = y - 0.5 * gradient(y)
    assert p.accuracy(y) > 0.9
    assert p.test_loss(y) == p.data.test.loss(y) != p.data.validation.loss(y)
    np.testing.assert_allclose(p.upper(y, p.x0), p.data.validation.loss(y))


def test_the_upper_smoothness_of_the_penalties_is_proved_only_on_request():
    assert digits_penalties().constants["upper_smoothness"] is None
    p = digits_penalties(prove_smoothness=True)
    assert p.constants["upper_smoothness"].value == p.data.validation.smoothness()


def test_flips_change_the_labels_that_they_say():
    clean = digits_split(seed=2).train
    right = jnp.argmax(clean.targets, axis=1)
    given_labels = jnp.argmax(cleaning().data.train.targets, axis=1)
    np.testing.assert_array_equal(cleaning().data.train.features, clean.features)
    np.testing.assert_array_equal(right != given_labels, cleaning().flipped)
    assert int(cleaning().flipped.sum()) == round(0.4 * 963)
    for part in ("validation", "test"):
        np.testing.assert_array_equal(
            getattr(cleaning().data, part).targets, getattr(digits_split(seed=2), part).targets
        )


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), threshold=st.floats(-3, 3))
def test_flip_f1_against_scikit_learn(seed, threshold):
    from sklearn.metrics import f1_score

    x = np.random.default_rng(seed).normal(size=963) - threshold
    expected = f1_score(cleaning().flipped, x < 0)
    np.testing.assert_allclose(cleaning().flip_f1(jnp.asarray(x)), expected, rtol=1e-12)


def test_no_flips_is_a_score_and_not_a_division_by_zero():
    p = hyper_cleaning(flipped=0.0)
    assert int(p.flipped.sum()) == 0
    assert p.flip_f1(p.x0) == 0


def one_sample(width: int, classes: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples(jnp.asarray(rng.normal(size=(1, width))), jnp.eye(classes)[:1])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 4.0))
def test_third_derivative_of_softmax_is_bounded_by_the_range_of_the_direction(seed, spread):
    samples = one_sample(3, 4, seed)
    rng = np.random.default_rng(seed)
    y, u, v = (jnp.asarray(rng.normal(size=(3, 4))) for _ in range(3))
    y = spread * y

    def curvature(y):
        return jax.jvp(lambda y: jax.jvp(samples.loss, (y,), (u,))[1], (y,), (u,))[1]

    second, third = jax.jvp(curvature, (y,), (v,))
    logits = samples.logits(v)
    reach = jnp.max(logits) - jnp.min(logits)
    # `second` is a variance, at times small: allow for the rounding of what cancels in it.
    rounding = 1e-13 * (1 + jnp.max(samples.logits(u) ** 2) * reach)
    assert abs(third) <= reach * second + rounding
    assert reach <= samples.self_concordance() * jnp.linalg.norm(v) * (1 + 1e-12)


def test_the_self_concordance_of_softmax_cannot_be_smaller():
    """Two classes far apart, seen along their contrast: third/second tends to √2 ‖a‖ ‖v‖."""
    samples = one_sample(3, 2, seed=0)
    a = samples.features[0]
    v = jnp.outer(a, jnp.array([1.0, -1.0])) / (jnp.sqrt(2.0) * jnp.linalg.norm(a))

    def curvature(y):
        return jax.jvp(lambda y: jax.jvp(samples.loss, (y,), (v,))[1], (y,), (v,))[1]

    second, third = jax.jvp(curvature, (8 * v / jnp.linalg.norm(a),), (v,))
    np.testing.assert_allclose(abs(third), samples.self_concordance() * second, rtol=1e-3)
