"""Around the solver: callbacks, budgets, continuing a run, checkpoints, kill -9."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance import zoo
from tests.conformance.killed import KILLED_AT, START, problem_to_kill
from tests.conformance.registry import FAMILIES, SOLVERS
from tolerax.checkpoint import Checkpoint, CheckpointError

every_solver = pytest.mark.parametrize("entry", SOLVERS, ids=str)
every_family = pytest.mark.parametrize("entry", FAMILIES, ids=str)


def assert_same_bits(one, other):
    """Solver state, best point, work, status and history, bit for bit."""
    leaves, structure = jax.tree.flatten(eqx.filter(one.state, eqx.is_array))
    others, other_structure = jax.tree.flatten(eqx.filter(other.state, eqx.is_array))
    assert structure == other_structure
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stop_at(number):
    """A callback that stops the run after so many answers."""

    def callback(step):
        if step.number == number:
            raise StopIteration

    return callback


@every_solver
def test_callback_sees_every_answer_in_order_and_the_best_so_far(entry):
    steps = []
    known = zoo.PROBLEMS["quadratic"]
    problem = zoo.python_objective(known.fun)
    solution = zoo.run(problem, entry.solver(), jnp.asarray(known.start), callback=steps.append)
    assert [step.number for step in steps] == list(range(1, int(solution.steps) + 1))
    told = [float(step.evaluation.value) for step in steps]
    assert [step.value for step in steps] == list(np.minimum.accumulate(told))
    rows = solution.history.rows()
    assert list(rows["value"]) == told
    assert list(rows["best_value"]) == [step.value for step in steps]
    assert list(rows["points"]) == [int(step.run.work.points) for step in steps]
    np.testing.assert_array_equal(steps[-1].x, solution.x)


@every_solver
def test_stopping_keeps_the_best_point_and_can_be_continued(entry):
    problem, start = zoo.python_objective("rosenbrock"), jnp.array([-1.2, 1.0])
    whole = zoo.run(problem, entry.solver(), start)
    part = zoo.run(problem, entry.solver(), start, callback=stop_at(7))
    assert int(part.steps) == 7
    assert float(part.value) == float(whole.history.rows()["best_value"][6])
    # The buffers of the history are those of the whole run, so the same steps fit in.
    rest = zoo.tolerax.solve(problem, entry.solver(), part.state, max_steps=zoo.STEPS - 7)
    assert_same_bits(whole, rest)


@every_family
def test_max_steps_is_exact_and_the_rest_equals_one_long_run(entry):
    problem = zoo.objective("rosenbrock")
    start = jnp.array([-1.2, 1.0])
    whole = zoo.run(problem, entry.solver(), start)
    part = zoo.tolerax.solve(problem, entry.solver(), start, max_steps=5)
    assert zoo.name_of(part.status) == "budget"
    assert int(part.steps) == int(part.work.points) == 5
    rest = zoo.tolerax.solve(problem, entry.solver(), part.state, max_steps=zoo.STEPS - 5)
    assert_same_bits(whole, rest)


@every_solver
def test_work_limits_stop_between_answers(entry):
    problem = zoo.python_objective("rosenbrock")
    start = jnp.array([-1.2, 1.0])
    for limit in (7, {"gradients": 7}, {"values": 7, "gradients": 1000}):
        solution = zoo.run(problem, entry.solver(), start, max_work=limit)
        assert zoo.name_of(solution.status) == "budget"
        kind = next(iter(limit)) if isinstance(limit, dict) else "units"
        assert int(getattr(solution.work, kind)) >= 7
        # A Hessian takes several gradients a point, and its products are units too.
        points = int(solution.work.points)
        assert (points <= 7) if entry.solver().uses_hessian else (points == 7)


@every_solver
def test_a_finished_run_stays_finished(entry):
    problem = zoo.python_objective("quadratic")
    done = zoo.run(problem, entry.solver(), jnp.asarray(zoo.START))
    again = zoo.tolerax.solve(problem, entry.solver(), done.state, max_steps=5)
    assert int(again.steps) == int(done.steps)
    assert again.success


@every_solver
def test_checkpoints_continue_to_identical_bits(entry, tmp_path):
    problem, start = zoo.python_objective("rosenbrock"), jnp.array([-1.2, 1.0])
    whole = zoo.run(problem, entry.solver(), start)
    often = Checkpoint(tmp_path / "run", every_steps=1)
    checkpoint = Checkpoint(tmp_path / "run", every_seconds=1e6)
    zoo.run(problem, entry.solver(), start, callback=stop_at(7), checkpoint=often)
    rest = zoo.run(problem, entry.solver(), start, checkpoint=checkpoint)
    assert_same_bits(whole, rest)

    last = checkpoint.files()[-1]
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match=last.name):
        zoo.run(problem, entry.solver(), start, checkpoint=checkpoint)
    last.unlink()

    with pytest.raises(CheckpointError, match="solver_options"):
        zoo.run(problem, entry.solver(atol=1e-3), start, checkpoint=checkpoint)
    other = zoo.python_objective("quadratic")
    with pytest.raises(CheckpointError, match="problem"):
        zoo.run(other, entry.solver(), start, checkpoint=checkpoint)


@every_family
def test_kill_9_loses_nothing(entry, tmp_path):
    command = [sys.executable, "-m", "tests.conformance.killed", entry.name, str(tmp_path / "run")]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    root = Path(__file__).parents[2]
    killed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = Checkpoint(tmp_path / "run", every_steps=1)
    assert checkpoint.exists()
    whole = zoo.run(problem_to_kill(0), entry.solver(), jnp.asarray(START))
    assert int(whole.steps) > KILLED_AT
    rest = zoo.run(problem_to_kill(0), entry.solver(), jnp.asarray(START), checkpoint=checkpoint)
    assert_same_bits(whole, rest)
