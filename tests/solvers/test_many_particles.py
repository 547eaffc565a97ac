"""Many particles: in blocks, and in little memory."""

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from tolerax import CBO
from tolerax.inner import particles
from tolerax.solvers import cbo


def shifted_parabola_with_holes():
    """A new function each time, so that nothing of an earlier run is compiled for it."""
    return lambda x: jnp.where(jnp.sin(40 * x[0]) > 0.7, jnp.nan, jnp.sum((x - 0.3) ** 2))


def test_many_particles_are_treated_in_blocks_and_move_as_few(monkeypatch):
    def run():
        problem, solver = tolerax.Objective(shifted_parabola_with_holes()), CBO(particles=128)
        return tolerax.solve(problem, solver, jnp.zeros(3), max_steps=60)

    whole = run()
    for module in (cbo, particles):
        monkeypatch.setattr(module, "LARGE", 100)
    blocks = run()
    assert int(blocks.work.points) == int(whole.work.points) == 60 * 128
    assert 0 < int(blocks.state.failures) == int(whole.state.failures)
    # Only the order of sums differs, and those decide when to stop, not where particles go.
    assert np.array_equal(blocks.x, whole.x)
    spread, other = (run.history.rows()["spread"] for run in (blocks, whole))
    assert np.allclose(spread, other, rtol=1e-12)


def test_many_particles_are_held_three_times_at_most():
    n, d = 110_000, 100
    assert n * d > particles.LARGE
    problem, solver = tolerax.Objective(lambda x: jnp.mean(jnp.cos(x))), CBO(particles=n)

    @jax.jit
    def three_steps(key):
        return tolerax.solve(problem, solver, jnp.zeros(d, jnp.float32), key=key, max_steps=3)

    memory = three_steps.lower(jax.random.key(0)).compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    # Those that the run returns, those that are asked for, those of the start, and about as much as
    # half of them for a block of 1/16 and for what there is one of a particle.
    assert held < 3.5 * n * d * 4
