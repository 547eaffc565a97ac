"""Workers that fail, hang and die: what becomes of their points."""

import logging
import multiprocessing
import os
import signal
import threading
import time
import unittest.mock
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerax
from tests.problems.simulators import Burst, Died, Simulator, bowl, key
from tolerax import Accuracy, Objective, PointStatus, Query, Status, Workers
from tolerax.errors import EvaluationError, WorkersLostError
from tolerax.problems import processes
from tolerax.problems.processes import Processes
from tolerax.problems.python_code import Wanted
from tolerax.problems.task import loads, task

VALUES = Wanted(None, 0, None, 1.0)
SOLVER, START, STEPS = tolerax.CBO(particles=8), jnp.zeros(2), 5
POINTS = [np.array([float(i), 1.0]) for i in range(8)]


class FakePool:
    """A process pool made of threads: when one of them raises `Died`, all futures are broken."""

    def __init__(self, workers=2):
        self._max_workers = workers
        self.threads = ThreadPoolExecutor(workers)
        self.lock, self.open, self.broken = threading.Lock(), set(), False
        self.most, self.down = 0, False

    def submit(self, fn, /, *args):
        with self.lock:
            if self.broken:
                raise BrokenProcessPool("a worker has died")
            future = Future()
            self.open.add(future)
            self.most = max(self.most, len(self.open))
        self.threads.submit(self.run, future, fn, args)
        return future

    def run(self, future, fn, args):
        try:
            result, error = fn(*args), None
        except Died:
            with self.lock:
                self.broken = True
                failed, self.open = self.open, set()
            for one in failed:
                one.set_exception(BrokenProcessPool("a worker has died"))
            return
        except Exception as raised:
            result, error = None, raised
        with self.lock:
            if future not in self.open:
                return
            self.open.remove(future)
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def shutdown(self, wait=True):
        self.down = True
        self.threads.shutdown(wait=wait)


def simulator(tmp_path, faults, points=POINTS):
    names = [(key(points[i]), fault) for i, fault in faults.items()]
    folder = tmp_path / "calls"
    folder.mkdir()
    return Simulator(str(folder), tuple(names))


def run(problem, start=START, **options):
    # One solver and one number of steps: compiled once.
    return tolerax.solve(problem, SOLVER, start, **({"max_steps": STEPS} | options))


def asked(step):
    """The points of the query at a step of `run` on the bowl."""
    seen = []
    run(Objective(lambda x: seen.append(x) or bowl(x), host=True))
    return seen[(step - 1) * SOLVER.particles : step * SOLVER.particles]


def outcomes(rows):
    return {i: row.outcome for i, row in enumerate(rows) if row.outcome != "answered"}


def check_values(rows, expected_failures):
    assert outcomes(rows) == expected_failures
    for x, row in zip(POINTS, rows, strict=True):
        assert row.calls == 1
        if row.outcome == "answered":
            assert row.value == bowl(x)
        else:
            assert np.isnan(row.value)


# -- real processes --------------------------------------------------------------------------------


def test_processes_that_are_killed_hang_and_raise(tmp_path, caplog):
    faults = {1: "killed once", 2: "killed", 4: "hangs", 5: "raises", 6: "ends"}
    fun = simulator(tmp_path, faults)
    with Workers(2, deadline=2.0, startup=60.0) as workers:
        with caplog.at_level(logging.WARNING, "tolerax"):
            rows = workers.evaluate(fun, POINTS, VALUES, "fail")
        check_values(rows, {2: "lost", 4: "timed_out", 5: "raised", 6: "raised"})
        # Every death is that of one point, and no other one is evaluated twice.
        assert fun.times("killed") == fun.times("killed once") == [2]
        assert fun.times("fine") == [1, 1, 1]
        again = workers.evaluate(fun, POINTS[:4], VALUES, "fail")
        assert [row.value for row in again[:2]] == [bowl(x) for x in POINTS[:2]]
        assert outcomes(again) == {2: "lost"}
        assert again[2].calls == 0  # never tried again
        assert fun.times("killed") == [2]
        assert workers.counts["made"] == 1
        with pytest.raises(
            RuntimeError, match=r"(?s)Burst: burst 1 2.*raised on a worker.*simulators"
        ):
            workers.evaluate(fun, [POINTS[0], POINTS[5]], VALUES)
        with pytest.raises(TypeError, match="cannot be sent to a worker"):
            workers.evaluate(lambda x: 0.0, POINTS, VALUES)
    assert workers.counts["lost"] == workers.counts["timed_out"] == 1
    assert workers.counts["raised"] == 2
    assert workers.first_error
    told = [record.message for record in caplog.records]
    assert sum("the objective raised" in text for text in told) == 1  # once, not twice
    assert any("2." in text and "killed its workers" in text for text in told)


def test_processes_are_replaced():
    pool = Processes(1)
    first = pool.submit(os.getpid).result()
    assert pool.submit(os.getpid).result() == first
    with pytest.raises(BrokenProcessPool):
        pool.submit(os.kill, first, signal.SIGKILL).result()
    second = pool.submit(os.getpid).result()
    assert second != first
    os.kill(second, signal.SIGKILL)
    # That one dies while nobody asks need not be noticed at once.
    for _ in range(100):
        try:
            assert pool.submit(os.getpid).result() != second
            break
        except BrokenProcessPool:
            time.sleep(0.1)
    waiting = pool.submit(time.sleep, 3600)
    with pytest.raises(RuntimeError, match="all 1 processes are busy"):
        pool.submit(os.getpid)
    pool.shutdown(wait=False)
    assert isinstance(waiting.exception(), BrokenProcessPool)


# -- pools of threads that break -------------------------------------------------------------------

FAULTS = ("fine", "nan", "raises", "dies", "dies once")


@pytest.mark.parametrize("apart", [False, True])
@given(st.lists(st.sampled_from(FAULTS), min_size=8, max_size=8), st.integers(1, 4))
@settings(max_examples=40)
def test_innocent_points_are_never_lost(tmp_path_factory, apart, faults, count):
    fun = simulator(tmp_path_factory.mktemp("w"), dict(enumerate(faults)))
    pools = []

    def make(size=count, mp_context=None):
        pools.append(FakePool(size))
        return pools[-1]

    with unittest.mock.patch.object(processes, "ProcessPoolExecutor", make):
        workers = Workers(count if apart else make)
        rows = workers.evaluate(fun, POINTS, VALUES, "fail")
        kinds = {"dies": "lost", "raises": "raised", "nan": "answered"}
        for x, row, fault in zip(POINTS, rows, faults, strict=True):
            assert row.outcome == kinds.get(fault, "answered")
            right = np.nan if fault in kinds else bowl(x)
            np.testing.assert_equal(row.value, right)
        if apart:
            # Every death is that of one point.
            assert set(fun.times("fine") + fun.times("nan") + fun.times("raises")) <= {1}
            assert set(fun.times("dies") + fun.times("dies once")) <= {2}
        # Else seen to kill twice, and perhaps once more in company.
        assert all(2 <= n <= 3 for n in fun.times("dies"))
        before = fun.times("dies")
        workers.evaluate(fun, POINTS, VALUES, "fail")
        assert fun.times("dies") == before
        assert max(pool.most for pool in pools) <= (1 if apart else count)
        workers.close()
    assert all(pool.down for pool in pools)


def test_retries_are_bounded(tmp_path):
    for retries in (0, 1, 3):
        fun = simulator(tmp_path, {2: "dies"})
        rows = Workers(lambda: FakePool(1), retries=retries).evaluate(fun, POINTS, VALUES)
        assert outcomes(rows) == {2: "lost"}
        assert fun.times("dies") == [retries + 1]  # with one worker there is no doubt
        for path in (tmp_path / "calls").iterdir():
            path.unlink()
        (tmp_path / "calls").rmdir()


def test_the_first_exception_in_order_is_raised_and_the_rest_is_spared(tmp_path):
    def fun(x):
        seen.append(x[0])
        if x[0] == 1:
            time.sleep(0.2)
        if x[0] >= 1:
            raise ArithmeticError(f"burst at {x[0]}")
        return bowl(x)

    for executor in (None, ThreadPoolExecutor(3)):
        seen = []
        with pytest.raises(ArithmeticError, match=r"burst at 1\.0"):
            Workers(executor).evaluate(fun, POINTS, VALUES)
        assert len(seen) <= 4
        assert seen[0] == 0


def test_a_broken_pool_that_was_given_ends_the_run(tmp_path, caplog):
    whole = run(Objective(bowl, host=True))
    fun = simulator(tmp_path, {3: "dies once"}, points=asked(2))
    problem = Objective(fun, host=True)
    part = run(problem, executor=FakePool())
    assert part.status == Status.worker_lost
    assert int(part.steps) == 1
    assert not part.success
    assert "the executor broke (BrokenProcessPool" in caplog.text
    # Its state continues the run on others.
    rest = run(problem, part.state, max_steps=STEPS - 1, executor=FakePool)
    np.testing.assert_array_equal(rest.x, whole.x)
    assert rest.steps == whole.steps


class Silent(FakePool):
    """Forgets points, as a cluster does that has lost all machines."""

    def submit(self, fn, /, *args):
        if len(args) > 1 and args[1][0] in (2, 3):
            return Future()
        return super().submit(fn, *args)


def test_points_of_which_nothing_is_heard_time_out():
    made = []

    def make():
        # The first pool forgets two points, later ones forget one of them.
        made.append(Silent() if len(made) < 1 else FakePool())
        return made[-1]

    workers = Workers(make, deadline=0.3, startup=0.3)
    rows = workers.evaluate(bowl, POINTS, VALUES)
    check_values(rows, {})
    assert len(made) == 2
    workers.close()

    workers = Workers(Silent, deadline=0.3, startup=0.3, retries=0)
    rows = workers.evaluate(bowl, POINTS, VALUES)
    check_values(rows, {2: "timed_out", 3: "timed_out"})
    workers.close()


class Mute:
    def submit(self, fn, /, *args):
        return Future()


class Refusing:
    def submit(self, fn, /, *args):
        raise RuntimeError("cannot schedule new futures after shutdown")


@pytest.mark.parametrize("executor", [Mute(), Mute, Refusing(), Refusing, lambda: 3 / 0, lambda: 4])
def test_executors_that_never_work(executor):
    with pytest.raises(WorkersLostError, match=r"does not work|cannot be made"):
        Workers(executor, deadline=0.1, startup=0.1).evaluate(bowl, POINTS, VALUES)


def test_executors_that_break_or_refuse_now_and_then(tmp_path):
    """New ones that break at once are made again; points that they refuse are tried again."""

    class Moody(FakePool):
        def submit(self, fn, /, *args):
            if len(made) == 1 and fn is loads:
                raise BrokenProcessPool("killed while it started")
            if fn is task and args[1][0] == 7 and len(made) < 4:
                raise RuntimeError("no")
            return super().submit(fn, *args)

    made = []

    def make():
        made.append(Moody())
        return made[-1]

    workers = Workers(make, retries=0)
    rows = workers.evaluate(bowl, POINTS, VALUES)
    # The last point was refused in company and alone.
    check_values(rows, {7: "lost"})
    assert workers.counts["made"] == 2
    workers.close()


def test_a_run_that_is_interrupted_leaves_nothing_behind():
    class Interrupted(FakePool):
        def submit(self, fn, /, *args):
            if fn is task and args[1][0] == 5:
                raise KeyboardInterrupt
            return super().submit(fn, *args)

    pools = []

    def make():
        pools.append(Interrupted())
        return pools[-1]

    workers = Workers(make)
    with pytest.raises(KeyboardInterrupt):
        workers.evaluate(bowl, POINTS, VALUES)
    workers.close()
    assert [pool.down for pool in pools] == [True]
    # The next evaluation begins anew.
    assert Workers(FakePool).evaluate(bowl, POINTS[:1], VALUES)[0].value == bowl(POINTS[0])


def test_minimize_takes_executors_too():
    with ThreadPoolExecutor(2) as pool:
        options = {"executor": pool, "maxiter": STEPS, "particles": SOLVER.particles}
        seen = set()

        def fun(x):
            seen.add(threading.current_thread().name)
            return float(np.sum((x - 1) ** 2))

        found = tolerax.minimize(fun, np.zeros(2), method="cbo", options=options)
    assert found.nfev == STEPS * SOLVER.particles
    # JAX is tried in this thread before.
    assert seen - {threading.current_thread().name}


# -- deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
def test_deadlines_hold_in_this_process_too(executor):
    release = threading.Event()

    def fun(x):
        if x[0] == 3:
            release.wait(20)
        return bowl(x)

    workers = Workers(executor, deadline=0.3)
    problem = Objective(fun, host=True).on(workers)
    ask = Query(jnp.asarray(POINTS), Accuracy(1.0, 1.0), mask=jnp.ones(8, bool), derivatives=0)
    evaluation = problem.evaluate(ask)
    release.set()
    late = np.asarray(evaluation.status == PointStatus.timed_out)
    np.testing.assert_array_equal(late, np.arange(8) == 3)
    np.testing.assert_array_equal(np.asarray(evaluation.status == PointStatus.ok), ~late)
    assert int(evaluation.work.points) == 8
    assert workers.counts == Counter(evaluated=8, timed_out=1)


def test_points_that_time_out_count_as_failures_of_a_run():
    problem = Objective(lambda x: time.sleep(9), host=True)
    workers = Workers(deadline=0.02)
    solution = run(problem, executor=workers)
    assert solution.status == Status.all_failed
    assert int(solution.state.failures) == SOLVER.particles


# -- cache -----------------------------------------------------------------------------------------


def test_a_cache_answers_the_same_bits_and_nothing_else():
    calls = []

    def fun(x):
        calls.append(x)
        return bowl(x)

    workers = Workers(cache=True)
    batch = [POINTS[0], POINTS[1], POINTS[0], -0.0 * POINTS[0], np.nextafter(POINTS[1], 9)]
    rows = workers.evaluate(fun, batch, VALUES)
    assert [row.calls for row in rows] == [1, 1, 0, 1, 1]
    assert rows[2].value == rows[0].value
    assert len(calls) == 4
    more = workers.evaluate(fun, [POINTS[1], POINTS[1].astype(np.float32)], VALUES)
    assert [row.calls for row in more] == [0, 1]
    # Gradients are something else, and so is another function.
    slope = Wanted(np.zeros_like, 1, None, 1.0)
    assert workers.evaluate(fun, [POINTS[1]], slope)[0].calls == 1
    assert workers.evaluate(bowl, [POINTS[1]], VALUES)[0].calls == 1
    assert workers.counts["cached"] == 2
    assert workers.counts["evaluated"] == len(calls) + 1
    # Without a cache a second look is one.
    calls.clear()
    Workers().evaluate(fun, [POINTS[0], POINTS[0]], VALUES)
    assert len(calls) == 2


# -- around a run ----------------------------------------------------------------------------------


def test_what_is_made_is_shut_down_and_what_is_given_is_not():
    class Watched(ThreadPoolExecutor):
        down = 0

        def shutdown(self, wait=True, **options):
            self.down += 1
            super().shutdown(wait=wait, **options)

    made = []

    def make():
        made.append(Watched(1))
        return made[-1]

    problem = Objective(bowl, host=True)
    run(problem, executor=make)
    assert [pool.down for pool in made] == [1]
    with Workers(make) as workers:
        run(problem, executor=workers)
        run(problem, executor=workers)
        assert [pool.down for pool in made] == [1, 0]
    assert [pool.down for pool in made] == [1, 1]
    with Watched(1) as given_pool:
        run(problem, executor=given_pool)
        assert given_pool.down == 0

    def breaks(x):
        raise ArithmeticError("burst")

    with pytest.raises(EvaluationError, match="burst"):
        run(Objective(breaks, host=True), executor=make)
    assert [pool.down for pool in made] == [1, 1, 1]


def test_the_first_failure_of_a_run_is_reported_once(caplog):
    def fun(x):
        if x[0] > 0:
            raise ArithmeticError(f"burst at {x}")
        return bowl(x)

    problem = Objective(fun, host=True, on_error="fail")
    for _ in range(2):
        caplog.clear()
        solution = run(problem)
        assert int(solution.state.failures) > 1
        assert f"{solution.state.failures} of 40 evaluations failed" in solution.message
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "ArithmeticError: burst at [" in caplog.text


def test_checkpoints_do_not_depend_on_the_executor(tmp_path):
    problem, path = Objective(bowl, host=True), str(tmp_path / "run")
    whole = run(problem)
    run(problem, max_work=16, checkpoint=path)
    with ThreadPoolExecutor(2) as pool:
        rest = run(problem, checkpoint=path, executor=pool, max_work=40)
    assert int(rest.work.points) == 40
    np.testing.assert_array_equal(rest.x, whole.x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"executor": 0}, ValueError, "at least 1 process"),
        ({"executor": True}, TypeError, "must have `submit"),
        ({"executor": "2"}, TypeError, "must have `submit"),
        ({"deadline": 0.0}, ValueError, "deadline is 0.0"),
        ({"deadline": float("nan")}, ValueError, "deadline is nan"),
        ({"startup": -1.0}, ValueError, "startup is -1.0"),
        ({"retries": -1}, ValueError, "retries is -1"),
        ({"in_flight": 0}, ValueError, "in_flight is 0"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, error, message):
    with pytest.raises(error, match=message):
        Workers(**arguments)


def test_pools_that_fork_are_refused():
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    with pytest.raises(ValueError, match=r"forks can deadlock with JAX. Give a number"):
        Workers(pool)
    with pytest.raises(WorkersLostError, match="forks can deadlock with JAX"):
        Workers(lambda: pool).evaluate(bowl, POINTS, VALUES)
    assert Burst(1, 2).args == ("burst 1 2",)
