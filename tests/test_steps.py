"""Runs on Python code: one compiled call a step, and the state is there whenever it is wanted."""

import jax.numpy as jnp
import numpy as np

import tolerax
from tolerax import _steps


def test_other_functions_and_starts_share_one_compiled_call_a_step():
    solver, box = tolerax.CDSM(), (-2.0 * jnp.ones(2), 2.0 * jnp.ones(2))

    def run(power, start, steps):
        fun = lambda x: float(np.sum(np.abs(x - 0.5) ** power))  # noqa: E731
        problem = tolerax.Objective(fun, host=True, bounds=box)
        return tolerax.solve(problem, solver, start * jnp.ones(2), max_steps=steps)

    before = _steps._step._cache_size()
    first = run(2, 1.0, 6)
    assert _steps._step._cache_size() == before + 1
    second = run(4, -1.0, 9)
    assert _steps._step._cache_size() == before + 1
    assert (int(first.steps), int(second.steps)) == (6, 9)


def test_a_callback_sees_every_answer_and_the_run_after_it():
    calls, seen = [], []

    def parabola(x):
        calls.append(float(np.sum(x**2)))
        return calls[-1]

    def look(step):
        assert float(step.evaluation.value[0]) == calls[-1]
        # The best point is that of the run which was told this answer.
        assert step.value == min(calls)
        seen.append(step.number)

    problem = tolerax.Objective(parabola, host=True, bounds=(-2.0, 2.0))
    solver = tolerax.ModelTrustRegion()
    solution = tolerax.solve(problem, solver, jnp.ones(2), max_steps=5, callback=look)
    assert seen == [1, 2, 3, 4, 5]
    # Watched or not, the steps are the same compiled code.
    again = tolerax.solve(problem, solver, jnp.ones(2), max_steps=5)
    assert np.array_equal(solution.x, again.x)
    assert np.array_equal(solution.history.rows()["value"], again.history.rows()["value"])
