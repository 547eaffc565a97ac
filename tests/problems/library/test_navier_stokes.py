"""The family of flows: its reference against a closed form and refinement, its equation against the
reference; and fields that are kept on disk."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax.problems.library import Flow, NavierStokes, VorticityBasis
from tolerax.problems.library.kept import kept

FAMILY = NavierStokes(16, 5, duration=0.5, viscosity=5e-3, forcing=1.0)
FLOWS = FAMILY.sample(jax.random.key(0), 2)


def relative(u, v):
    return np.linalg.norm(u - v) / np.linalg.norm(v)


def test_vortices_of_taylor_and_green_decay():
    """A single wave: it advects nothing, and decays with exp(-nu |k|^2 t)."""
    family = NavierStokes(16, 5, duration=0.5, viscosity=5e-3)
    x, t = family.x, family.t[:, None, None]
    w0 = 3 * np.cos(2 * np.pi * x)[:, None] * np.sin(4 * np.pi * x)[None]
    found = family.solve(Flow(jnp.asarray(w0)[None], jnp.zeros((1, 16, 16))))[0]
    exact = np.exp(-family.viscosity * 5 * (2 * np.pi) ** 2 * t) * w0[None]
    np.testing.assert_allclose(found, exact, atol=1e-13)


def test_the_reference_converges_in_space_and_with_fourth_order_in_time():
    one, two, best = (FAMILY.solve(FLOWS, 2, steps) for steps in (1, 2, 8))
    # Errors C h^4: 16 less what the best one has itself.
    assert 13 < relative(one, best) / relative(two, best) < 19
    coarse, finer = (FAMILY.solve(FLOWS, refine, 8) for refine in (1, 3))
    # What is left are the frequencies above those of the grid, which fall geometrically.
    assert relative(best, finer) < 0.05 * relative(coarse, finer)
    assert relative(best, finer) < 1e-4


def test_the_reference_obeys_the_equation():
    w, equation = FAMILY.solve(FLOWS), FAMILY.equation
    z = jax.vmap(equation.channels)(w)
    rows = jax.vmap(equation.residual)(z, jax.vmap(equation.data)(FLOWS))
    # Differences in time leave h^4 / 5 of the fifth derivative at the ends, with h = 1 / 8.
    assert np.sqrt(np.mean(rows**2)) < 0.02 * np.sqrt(np.mean(z[:, 0] ** 2))
    # The network is shown the rate at the beginning: what the equation says w_t is there.
    rate = jax.vmap(FAMILY.features)(FLOWS)[:, 1, 0]
    slope = np.einsum("t,btxy->bxy", [-25 / 12, 4, -3, 4 / 3, -1 / 4], w) / FAMILY.t[1]
    assert relative(slope, rate) < 0.02


def test_a_basis_vanishes_at_the_beginning_and_has_mean_zero():
    network = VorticityBasis(FAMILY, 3, width=4, modes=2, layers=1, key=jax.random.key(0))
    basis = eqx.filter_jit(network)(jax.tree.map(lambda leaf: leaf[0], FLOWS))
    assert basis.shape == (3, *FAMILY.grid)
    assert not np.any(basis[:, 0])
    assert np.all(np.any(basis[:, 1:] != 0, axis=(1, 2, 3)))
    np.testing.assert_allclose(basis.mean(axis=(2, 3)), 0, atol=1e-12)


def test_a_basis_has_waves_that_do_not_depend_on_each_other():
    network = VorticityBasis(FAMILY, 30, width=4, modes=2, layers=1, key=jax.random.key(0))
    network = eqx.tree_at(lambda n: n.operator.project[1], network, replace_fn=jnp.zeros_like)
    basis = network(jax.tree.map(lambda leaf: leaf[0], FLOWS))
    assert basis.shape == (30, *FAMILY.grid)
    waves = np.asarray(basis[6:, -1]).reshape(24, -1)
    # All cosines and sines have the same mean square; those of the first 12 pairs fit the grid.
    np.testing.assert_allclose(waves @ waves.T / waves.shape[1], 0.5 * np.eye(24), atol=1e-12)


def test_a_key_gives_the_same_flows_on_every_grid():
    finer = NavierStokes(48, 5, forcing=1.0).sample(jax.random.key(0), 2)
    coarse = NavierStokes(32, 5, forcing=1.0).sample(jax.random.key(0), 2)
    np.testing.assert_allclose(finer.w0[:, ::3, ::3], coarse.w0[:, ::2, ::2], atol=1e-12)
    many = FAMILY.sample(jax.random.key(1), 400)
    # 400 fields of about 6 waves that matter: the variance is known to 3 %.
    np.testing.assert_allclose(np.mean(many.w0**2), 1.0, atol=0.1)
    np.testing.assert_allclose(many.w0.mean(axis=(1, 2)), 0, atol=1e-12)


def test_fields_are_kept_on_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TOLERAX_CACHE", str(tmp_path / "data"))
    calls = []

    def compute():
        calls.append(1)
        return jnp.arange(3.0)

    for given in (1.0, 1.0, 2.0):
        np.testing.assert_array_equal(kept("numbers-1", given, compute), np.arange(3.0))
    assert len(calls) == 2
    (file, _) = sorted((tmp_path / "data").iterdir())
    assert file.suffix == ".npy"
    for file in (tmp_path / "data").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # a disk that was full
    kept("numbers-1", 1.0, compute)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="cache=True needs numbers"):
        jax.jit(lambda w0: FAMILY.solve(Flow(w0, w0), cache=True))(FLOWS.w0)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TOLERAX_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        kept("numbers-1", 1.0, compute)
    assert "is not kept" in caplog.text
    monkeypatch.setenv("TOLERAX_CACHE", str(tmp_path / "fields"))
    first, again = (FAMILY.solve(FLOWS, cache=True) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(list((tmp_path / "fields").iterdir())) == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n is 9"):
        NavierStokes(9)
    with pytest.raises(ValueError, match="viscosity is -1"):
        NavierStokes(viscosity=-1.0)
    with pytest.raises(ValueError, match="steps is 0"):
        FAMILY.solve(FLOWS, steps=0)
