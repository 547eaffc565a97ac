"""Pictures, differences, filters and the quality of what the two denoisers do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerax.problems.library import field_of_experts, tv_denoising
from tolerax.problems.library.experts import cosine_filters, responses
from tolerax.problems.library.pictures import NAMES, crops
from tolerax.problems.library.total_variation import differences, divergence


def test_all_ten_pictures_are_there_grey_and_not_flat():
    pictures = crops(seed=0, size=96, pictures=10)
    assert len(NAMES) == 10
    assert pictures.shape == (10, 96, 96)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert (pictures.std(axis=(1, 2)) > 0.005).all()
    assert (np.abs(np.diff(pictures, axis=0)).max(axis=(1, 2)) > 0.1).all()


def test_fewer_pictures_are_the_first_of_the_same_crops():
    np.testing.assert_array_equal(crops(3, 20, 4), crops(3, 20, 10)[:4])


def test_largest_crop_of_every_picture():
    assert crops(seed=0, size=300, pictures=10).shape == (10, 300, 300)


def test_noise_and_upper_level_have_the_stated_scales():
    p = tv_denoising(seed=0, size=64, pictures=10, sigma=0.2)
    noise = p.noisy - p.clean
    # 40960 samples: the standard deviation of their standard deviation is 0.35 %.
    assert float(jnp.std(noise)) == pytest.approx(0.2, rel=0.02)
    assert float(p.upper(p.clean, p.x0)) == 0
    assert float(p.upper(p.noisy, p.x0)) == pytest.approx(
        float(p.mean_squared_error(p.noisy)) * 64**2 / 2
    )
    assert float(p.psnr(p.noisy)) == pytest.approx(-20 * np.log10(0.2), abs=0.1)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_differences_and_their_transpose(seed):
    rng = np.random.default_rng(seed)
    y, v = jnp.asarray(rng.normal(size=(2, 5, 4))), jnp.asarray(rng.normal(size=(2, 2, 5, 4)))
    np.testing.assert_allclose(jnp.vdot(differences(y), v), jnp.vdot(y, divergence(v)), atol=1e-12)
    np.testing.assert_allclose(differences(y)[0, :, 1, 2], y[:, 2, 2] - y[:, 1, 2])
    np.testing.assert_allclose(differences(y)[1, :, 1, 2], y[:, 1, 3] - y[:, 1, 2])
    assert not differences(y)[0, :, -1].any()
    assert not differences(y)[1, :, :, -1].any()


def test_norms_of_the_differences():
    matrix = np.asarray(jax.jacobian(differences)(jnp.zeros((1, 12, 12)))).reshape(2, 144, 144)
    assert 7.8 < np.linalg.norm(matrix.reshape(288, 144), 2) ** 2 < 8
    pixel = np.linalg.norm(matrix, 2, axis=(0, 2)) ** 2
    np.testing.assert_allclose(pixel.max(), 3, rtol=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_norms_of_the_filters(seed):
    rng = np.random.default_rng(seed)
    c = jnp.asarray(rng.normal(size=(1, 3, 3)))
    y = jnp.asarray(rng.normal(size=(1, 9, 9)))
    t = responses(y, c)
    assert t.shape == (1, 1, 7, 7)
    np.testing.assert_allclose(t[0, 0, 2, 3], jnp.sum(c[0] * y[0, 2:5, 3:6]), rtol=1e-10)
    assert jnp.max(jnp.abs(t)) <= jnp.linalg.norm(c) * jnp.linalg.norm(y)
    assert jnp.linalg.norm(t) <= jnp.sum(jnp.abs(c)) * jnp.linalg.norm(y)


def test_cosine_filters_are_orthonormal_and_blind_to_the_mean():
    c = cosine_filters(8, 5)
    flat = c.reshape(8, 25)
    np.testing.assert_allclose(flat @ flat.T, np.eye(8), atol=1e-14)
    np.testing.assert_allclose(flat.sum(axis=1), 0, atol=1e-14)


def test_field_of_experts_has_217_parameters():
    p = field_of_experts(size=16, pictures=1)
    assert sum(leaf.size for leaf in jax.tree.leaves(p.x0)) == 217
    assert {key: leaf.shape for key, leaf in p.x0.items()} == {
        "filters": (8, 5, 5),
        "log_weights": (8,),
        "log_smoothings": (8,),
        "log_weight": (),
    }


@pytest.mark.parametrize("name", ["total variation", "experts"])
def test_tuned_by_hand_the_denoisers_denoise(name):
    if name == "total variation":
        p = tv_denoising(seed=0, size=64, pictures=3)
        tuned, gain = jnp.array([-2.5, -4.0]), 6.0
    else:
        p = field_of_experts(seed=0, size=64, pictures=3)
        tuned, gain = p.x0 | {"log_weight": jnp.asarray(-4.0)}, 3.0

    @eqx.filter_jit
    def denoise(problem, x):
        return problem.oracle.solve_state(x, 1e-3)[0]

    start, better = denoise(p.problem, p.x0), denoise(p.problem, tuned)
    assert p.psnr(p.noisy) < p.psnr(start) < p.psnr(better)
    assert p.psnr(better) > p.psnr(p.noisy) + gain
    assert p.upper(better, tuned) < p.upper(start, p.x0)
