"""What solvers that ask for values at many points must do: the same questions as for those that
follow gradients, put to populations. A new solver joins with one line in `POPULATIONS`."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tolerax
from tests.conformance import zoo
from tests.conformance.test_runs import stop_at
from tolerax import CBO, Solver, Status
from tolerax.checkpoint import Checkpoint, CheckpointError
from tolerax.solvers import (
    ConsensusFreezing,
    ConsensusHopping,
    ConsensusSampling,
    EffectiveSampleSize,
    Isotropic,
    SoftConsensus,
)

STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Population:
    """`make(**fields)`: the solver; `method`: its name in `minimize`."""

    name: str
    make: Callable[..., Solver]
    method: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def solver(self, **fields: Any) -> Solver:
        return self.make(**{**self.fields, **fields})


POPULATIONS = (
    Population("cbo", CBO, "cbo", {"particles": 40}),
    Population("cbo-soft", CBO, None, {"particles": 60, "consensus": SoftConsensus(100.0)}),
    Population(
        "cbo-isotropic",
        CBO,
        None,
        {
            "particles": 60,
            "noise": Isotropic(0.3),
            "dt": 0.2,
            "consensus": EffectiveSampleSize(0.2),
        },
    ),
    Population("cbo-memory-batch", CBO, None, {"particles": 60, "batch": 40, "memory": 0.4}),
    Population("hopping", ConsensusHopping, "consensus-hopping", {"particles": 40}),
    Population("freezing", ConsensusFreezing, "consensus-freezing", {"particles": 40}),
    Population(
        "sampling", ConsensusSampling, None, {"particles": 60, "mode": "optimize", "share": 0.7}
    ),
)
every = pytest.mark.parametrize("entry", POPULATIONS, ids=str)
# For what depends on the code of a solver and not on its fields. Freezing is CBO with a noise.
FAMILIES = tuple(entry for entry in POPULATIONS if entry.name in ("cbo", "hopping"))
each_family = pytest.mark.parametrize("entry", FAMILIES, ids=str)
# Half of the particles agree to 1e-4 * (1 + |x|) when they stop, and the best is one of them.
CLOSE = 2e-2


def run(problem, solver, start, **options):
    return tolerax.solve(problem, solver, start, **({"max_steps": STEPS} | options))


def python(fun=zoo.quadratic, bounds=None, **options):
    bounds = bounds or (jnp.full(2, -jnp.inf), jnp.full(2, jnp.inf))
    return tolerax.Objective(fun, bounds=bounds, host=True, **options)


CASES = [(e, "quadratic") for e in POPULATIONS]
CASES += [(POPULATIONS[0], name) for name in ("bounded", "half_bounded", "rosenbrock")]


@pytest.mark.parametrize(("entry", "name"), CASES, ids=str)
def test_reaches_a_known_minimum(entry, name):
    known = zoo.PROBLEMS[name]
    solution = run(zoo.objective(known.fun, known=known), entry.solver(), jnp.asarray(known.start))
    assert solution.status == Status.consensus, solution.message
    assert solution.success
    x = np.asarray(solution.x)
    # The valley of Rosenbrock's function is flat: its curvature is 0.4 along it, 1002 across.
    np.testing.assert_allclose(x, known.minimum, atol=CLOSE if name != "rosenbrock" else 0.2)
    assert np.all((x >= known.lower) & (x <= known.upper))
    assert float(solution.value) == pytest.approx(float(zoo.Python(known.fun).fun(x)), rel=1e-12)
    assert int(solution.state.failures) == 0


@each_family
def test_never_leaves_the_bounds(entry):
    for name in ("bounded", "half_bounded"):
        known = zoo.PROBLEMS[name]
        seen = zoo.Recorded(zoo.quadratic)
        problem = python(seen, (jnp.asarray(known.lower), jnp.asarray(known.upper)))
        run(problem, entry.solver(), jnp.asarray(known.start), max_steps=30)
        points = np.array(seen.points)
        assert len(points) > 300
        assert np.all((points >= known.lower) & (points <= known.upper))


@each_family
def test_a_budget_of_points_is_kept_to_the_point(entry):
    seen = zoo.Recorded(zoo.quadratic)
    solution = run(python(seen), entry.solver(), jnp.asarray(zoo.START), max_work={"points": 137})
    assert solution.status == Status.budget
    assert len(seen.points) == int(solution.work.points) == 137
    assert float(solution.value) == min(seen.values)


@each_family
def test_the_best_point_is_the_best_of_all_points(entry):
    seen, steps = zoo.Recorded(zoo.quadratic), []
    solution = run(
        python(seen), entry.solver(), jnp.asarray(zoo.START), max_steps=20, callback=steps.append
    )
    assert float(solution.value) == min(seen.values)
    np.testing.assert_array_equal(solution.x, seen.points[int(np.argmin(seen.values))])
    assert [step.number for step in steps] == list(range(1, 21))
    rows = solution.history.rows()
    assert list(rows["best_value"]) == list(np.minimum.accumulate(rows["value"]))
    assert {"iteration", "spread", "effective"} <= set(rows)


@each_family
def test_a_callback_stops_the_run(entry):
    solution = run(python(), entry.solver(), jnp.asarray(zoo.START), callback=stop_at(3))
    assert solution.status == Status.stopped
    assert int(solution.steps) == 3


@each_family
@pytest.mark.parametrize("kind", ["nan", "inf", "raise"])
def test_points_that_fail_are_counted_and_cost_nothing_else(entry, kind):
    """Where x[0] + x[1] > 0.5, half of the start, there is no value; the minimum lies outside."""
    failed = []

    def fun(x):
        if x[0] + x[1] > 0.5:
            failed.append(x)
            if kind == "raise":
                raise RuntimeError("no convergence")
            return np.nan if kind == "nan" else np.inf
        return zoo.quadratic(x)

    solver = entry.solver(spread=3.0)
    start = jnp.array([0.0, 0.0])
    solution = run(python(fun, on_error="fail"), solver, start, max_steps=300)
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=CLOSE)
    assert int(solution.state.failures) == len(failed) > 10
    assert f"{len(failed)} of" in solution.message


@each_family
def test_all_failing_is_a_status(entry):
    for name in ("always_nan", "always_inf"):
        solution = run(zoo.objective(name), entry.solver(), jnp.asarray(zoo.START))
        assert solution.status == Status.all_failed
        assert not solution.success
        assert int(solution.steps) == 1


@each_family
def test_an_exception_carries_the_best_point_so_far(entry):
    calls = []

    def fun(x):
        calls.append(zoo.quadratic(x))
        if len(calls) > 150:
            raise ZeroDivisionError("no")
        return calls[-1]

    with pytest.raises(tolerax.errors.EvaluationError) as caught:
        run(python(fun), entry.solver(), jnp.asarray(zoo.START))
    # The answers before the batch that failed.
    assert float(caught.value.solution.value) in calls
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@each_family
def test_a_value_of_minus_infinity_is_unbounded(entry):
    solution = run(zoo.objective("minus_inf"), entry.solver(), jnp.asarray(zoo.START))
    assert solution.status == Status.unbounded


@each_family
def test_a_value_that_does_not_come_again_is_no_success(entry):
    seen = set()

    def again(x):
        known = x.tobytes() in seen
        seen.add(x.tobytes())
        return zoo.quadratic(x) + 1e-3 * known

    solution = run(python(again), entry.solver(tol=1e-2), jnp.asarray(zoo.START))
    assert solution.status == Status.not_reproduced


@each_family
def test_pytrees_jit_and_vmap(entry):
    centre = {"a": jnp.array(1.0), "b": jnp.array([[0.5, -1.0], [2.0, 0.0]])}

    def fun(x):
        return sum(jnp.sum((x[k] - centre[k]) ** 2) for k in centre)

    problem, solver = tolerax.Objective(fun), entry.solver()
    start = jax.tree.map(jnp.zeros_like, centre)
    one = lambda key: tolerax.solve(problem, solver, start, key=key, max_steps=400)  # noqa: E731
    keys = jax.random.split(jax.random.key(3), 3)
    batch = jax.jit(jax.vmap(one))(keys)
    for i, key in enumerate(keys):
        single = one(key)
        assert jax.tree.structure(single.x) == jax.tree.structure(start)
        for leaf, many, truth in zip(
            *map(jax.tree.leaves, (single.x, batch.x, centre)), strict=True
        ):
            np.testing.assert_allclose(leaf, truth, atol=CLOSE)
            np.testing.assert_allclose(many[i], leaf, rtol=1e-9, atol=1e-12)
        assert int(batch.work.points[i]) == int(single.work.points)


@each_family
def test_float32_stays_float32(entry):
    start = jnp.asarray(zoo.START, jnp.float32)
    problem = tolerax.Objective(zoo.quadratic)
    solution = run(problem, entry.solver(), start)
    assert solution.x.dtype == solution.value.dtype == jnp.float32
    assert solution.success
    np.testing.assert_allclose(solution.x, zoo.CENTRE, atol=CLOSE)


@each_family
def test_the_key_decides_and_nothing_else(entry):
    problem = zoo.objective("quadratic")
    one, other, third = (
        run(problem, entry.solver(), jnp.asarray(zoo.START), key=jax.random.key(k), max_steps=20)
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.state.solver_state.x, other.state.solver_state.x)
    assert float(one.value) != float(third.value)


@every
def test_a_run_in_parts_gives_the_same_bits(entry, tmp_path):
    problem, start = python(), jnp.asarray(zoo.START)
    whole = run(problem, entry.solver(), start, max_steps=30)
    first = run(problem, entry.solver(), start, max_steps=11)
    rest = run(problem, entry.solver(), first.state, max_steps=19)
    np.testing.assert_array_equal(rest.state.solver_state.x, whole.state.solver_state.x)
    np.testing.assert_array_equal(rest.history.rows()["value"], whole.history.rows()["value"])
    path = str(tmp_path / "run")
    run(problem, entry.solver(), start, max_steps=30, callback=stop_at(7), checkpoint=path)
    again = run(problem, entry.solver(), start, max_steps=30, checkpoint=path)
    np.testing.assert_array_equal(again.x, whole.x)
    assert int(again.work.points) == int(whole.work.points)


@each_family
def test_a_foreign_checkpoint_is_refused(entry, tmp_path):
    path = str(tmp_path / "run")
    run(python(), entry.solver(), jnp.asarray(zoo.START), max_steps=5, checkpoint=path)
    with pytest.raises(CheckpointError):
        run(python(), entry.solver(particles=50), jnp.asarray(zoo.START), checkpoint=path)


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
from tests.conformance import test_populations as populations
from tolerax.checkpoint import Checkpoint
def killer(step):
    if step.number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
entry = next(e for e in populations.POPULATIONS if e.name == sys.argv[1])
populations.run(populations.python(), entry.solver(), jnp.asarray(populations.zoo.START),
                max_steps=20, callback=killer, checkpoint=Checkpoint(sys.argv[2], every_steps=1))
"""


@each_family
def test_kill_9_loses_nothing(entry, tmp_path):
    path = str(tmp_path / "run")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, entry.name, str(path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL
    whole = run(python(), entry.solver(), jnp.asarray(zoo.START), max_steps=20)
    checkpoint = Checkpoint(path, every_steps=1)
    rest = run(
        python(), entry.solver(), jnp.asarray(zoo.START), max_steps=20, checkpoint=checkpoint
    )
    assert int(rest.steps) == int(whole.steps)
    np.testing.assert_array_equal(rest.state.solver_state.x, whole.state.solver_state.x)
    assert float(rest.value) == float(whole.value)


@pytest.mark.parametrize("entry", [e for e in POPULATIONS if e.method], ids=str)
def test_minimize_knows_it(entry):
    bounds = [(-5, 5), (-5, 5)]
    options = {"max_steps": STEPS} | entry.fields
    result = tolerax.minimize(
        zoo.quadratic, zoo.START, method=entry.method, bounds=bounds, options=options
    )
    assert result.success
    assert result.status == 0
    assert result.status_name == "consensus"
    np.testing.assert_allclose(result.x, zoo.CENTRE, atol=CLOSE)
    assert result.nfev == int(result.solution.work.points)
    # Python code that JAX cannot trace needs no derivative here.
    plain = tolerax.minimize(
        lambda x: float(zoo.quadratic(x)), zoo.START, method=entry.method, options=options
    )
    assert plain.success
    if not entry.make().honours_constraints:
        with pytest.raises(ValueError, match="constraints"):
            tolerax.minimize(
                zoo.quadratic,
                zoo.START,
                method=entry.method,
                constraints={"type": "eq", "fun": zoo.quadratic},
            )
    with pytest.raises(ValueError, match="unknown option 'particle'"):
        tolerax.minimize(zoo.quadratic, zoo.START, method=entry.method, options={"particle": 3})
