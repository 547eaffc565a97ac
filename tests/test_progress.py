import builtins
import io
import logging
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tolerax._live import close_from_compiled, report_from_compiled
from tolerax.progress import (
    LogProgress,
    ProgressBar,
    Silent,
    resolve,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Recorder:
    def __init__(self):
        self.calls = []

    def start(self, total, description):
        self.calls.append(("start", total, description))

    def update(self, step, **scalars):
        self.calls.append(("update", step, scalars))

    def close(self, message):
        self.calls.append(("close", message))

    @property
    def steps(self):
        return [call[1] for call in self.calls if call[0] == "update"]


def drain(function, *args):
    out = jax.block_until_ready(function(*args))
    jax.effects_barrier()
    return out


# What `resolve` takes


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, Silent),
        (False, Silent),
        ("silent", Silent),
        (True, ProgressBar),
        ("bar", ProgressBar),
        ("log", LogProgress),
    ],
)
def test_resolve_names(given, kind):
    assert type(resolve(given)) is kind


def test_resolve_keeps_what_is_resolved():
    for progress in (Silent(), ProgressBar(), LogProgress(), resolve(print), resolve(Recorder())):
        assert resolve(progress) is progress


def test_resolve_object_and_callable_get_python_numbers():
    recorder = Recorder()
    seen = []
    for progress in (resolve(recorder), resolve(lambda step, **s: seen.append((step, s)))):
        progress.start(7, "run")
        progress.update(np.int32(2), value=jnp.float32(0.5), count=3)  # pyright: ignore
        progress.close("done")
    assert recorder.calls == [
        ("start", 7, "run"),
        ("update", 2, {"value": 0.5, "count": 3.0}),
        ("close", "done"),
    ]
    assert seen == [(2, {"value": 0.5, "count": 3.0})]
    assert type(seen[0][0]) is int
    assert all(type(value) is float for value in seen[0][1].values())


@pytest.mark.parametrize("given", [3, 1.5, [], object(), {"bar": True}])
def test_resolve_refuses_other_things(given):
    with pytest.raises(TypeError, match=r"progress is .* callable"):
        resolve(given)


def test_resolve_names_the_remedy_for_a_class_a_typo_and_half_an_object():
    with pytest.raises(TypeError, match=r"pass an instance, ProgressBar\(\)"):
        resolve(ProgressBar)
    with pytest.raises(ValueError, match=r"progress is 'bars'.*\"log\""):
        resolve("bars")

    class Half(Recorder):
        close = None  # pyright: ignore

        def __call__(self, step):
            raise AssertionError

    with pytest.raises(TypeError, match="start, update and close"):
        resolve(Half())


# Throttling, with a clock in the test's hands


def test_text_lines_are_throttled_and_the_last_one_is_written():
    clock, file = Clock(), io.StringIO()
    bar = ProgressBar("text", file, clock=clock)
    bar.start(1000, "descent")
    for step in range(1, 1001):
        clock.now += 0.01
        bar.update(step, value=1 / step)
    bar.close("converged")
    lines = file.getvalue().splitlines()
    # 10 seconds at one line a second: the first update, then nine or ten more, then the last
    # step and the message.
    assert 12 <= len(lines) <= 13
    assert lines[0] == "descent: 1/1000 (0 %) value=1 [0.0 s]"
    assert lines[-2] == "descent: 1000/1000 (100 %) value=0.001 [10.0 s]"
    assert lines[-1] == "converged"


def test_terminal_rewrites_one_line_ten_times_a_second(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    clock, file = Clock(), Terminal()
    bar = ProgressBar("text", file, clock=clock)
    bar.start(None, "a description that is longer than the terminal is wide")
    bar.update(1)
    bar.close("")
    bar.start(None, "d")
    for step in range(1, 201):
        clock.now += 0.01
        bar.update(step, long=1 / 3, short=10.0)
    bar.close("stopped")
    first, second, end = file.getvalue().split("\n")[:3]
    assert first == "\r" + "a description that is longer than the terminal is wide"[:39]
    draws = second.split("\r")[1:]
    # Two seconds at ten a second, plus the last step; rounding of the clock may merge a few.
    assert 18 <= len(draws) <= 22
    assert draws[-1].rstrip() == "d: step 200 long=0.3333 short=10 [2.0 s]"[:39]
    assert end == "stopped"


def test_a_shorter_line_covers_the_longer_one_before(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    bar = ProgressBar("text", file, interval=0.0, clock=lambda: 0.0)
    bar.update(1, value=0.12345)
    bar.update(2, value=1.0)
    bar.close()
    before, after = file.getvalue().rstrip("\n").split("\r")[1:]
    assert len(after) == len(before)


def test_an_update_after_close_begins_again():
    file = io.StringIO()
    bar = ProgressBar("text", file, clock=lambda: 0.0)
    bar.start(5, "run")
    bar.update(5)
    bar.close("one")
    bar.close("not shown")
    bar.update(2)
    bar.close("two")
    assert file.getvalue().splitlines() == [
        "run: 5/5 (100 %) [0.0 s]",
        "one",
        "run: 2/5 (40 %) [0.0 s]",
        "two",
    ]


def test_bar_goes_to_the_stderr_of_the_moment(capsys):
    bar = ProgressBar("text")
    bar.start(2, "run")
    bar.update(1, value=float("nan"))
    bar.close("ended")
    out, err = capsys.readouterr()
    assert out == ""
    assert "run: 1/2 (50 %) value=nan" in err
    assert err.endswith("ended\n")


def test_log_records(caplog):
    clock = Clock()
    progress = LogProgress(logging.DEBUG, interval=1.0, clock=clock)
    with caplog.at_level(logging.DEBUG, "tolerax"):
        progress.start(None, "run")
        for step in range(1, 26):
            clock.now += 0.1
            progress.update(step, value=0.5)
        progress.close("budget spent")
    messages = [record.getMessage() for record in caplog.records]
    assert {(record.name, record.levelno) for record in caplog.records} == {
        ("tolerax", logging.DEBUG)
    }
    assert messages[:2] == ["run: started", "run: step 1 value=0.5 [0.1 s]"]
    assert messages[-2:] == ["run: step 25 value=0.5 [2.5 s]", "run: budget spent"]
    assert len(messages) in (6, 7)  # 2.5 seconds at one record a second; the clock rounds


def test_package_logger_is_quiet_by_default():
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("tolerax").handlers)


@pytest.mark.parametrize("arguments", [{"interval": -1.0}, {"style": "fancy"}])
def test_bad_bar_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ProgressBar(**arguments)


# tqdm


def test_tqdm_bar():
    pytest.importorskip("tqdm")
    clock, file = Clock(), io.StringIO()
    bar = ProgressBar("tqdm", file, clock=clock)
    bar.start(50, "descent")
    for step in range(1, 51):
        clock.now += 0.03
        bar.update(step, value=1 / step)
    bar.close("converged")
    draws = file.getvalue().split("\r")
    assert "descent" in draws[-1]
    assert "50/50" in draws[-1]
    assert "value=0.02" in draws[-1]
    assert draws[-1].endswith("converged\n")
    # 1.5 seconds at ten a second; tqdm draws once more on opening and on closing.
    assert len(draws) <= 20


def test_without_tqdm(monkeypatch):
    real_import = builtins.__import__

    def no_tqdm(name, *args, **kwargs):
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_tqdm)
    file = io.StringIO()
    bar = ProgressBar(file=file)
    bar.update(1)
    bar.close()
    assert file.getvalue().startswith("step 1 [")
    with pytest.raises(ImportError, match="pip install tqdm"):
        ProgressBar("tqdm")


# Failures and threads


def test_failures_are_logged_once(caplog):
    def fails(step, **scalars):
        raise RuntimeError("the user's mistake")

    progress = resolve(fails)
    for step in range(5):
        progress.update(step)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "the user's mistake" in caplog.text


def test_a_closed_stream_does_not_stop_a_run(caplog):
    for style in ("text", "auto"):
        file = io.StringIO()
        bar = ProgressBar(style, file, interval=0.0)
        bar.start(3, "run")
        file.close()
        bar.update(1)
        bar.close("done")
    assert len(caplog.records) == 2


def test_interrupts_go_through():
    def interrupts(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(interrupts).update(1)


def test_calls_from_threads_do_not_overlap():
    class Checks(Recorder):
        inside = 0

        def update(self, step, **scalars):
            self.inside += 1
            assert self.inside == 1
            super().update(step, **scalars)
            self.inside -= 1

    checks = Checks()
    progress = resolve(checks)
    threads = [
        threading.Thread(target=lambda: [progress.update(k) for k in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks.calls) == 2000
    assert sorted(checks.steps) == sorted(list(range(500)) * 4)


# Compiled loops


def halve(progress, every, x, steps):
    def body(carry):
        step, x = carry[0] + 1, carry[1] / 2
        if progress is not None:
            report_from_compiled(progress, every, step, {"x": x})
        return step, x

    step, x = jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, x))
    if progress is not None:
        close_from_compiled(progress, step, {"x": x}, "done")
    return x


def test_compiled_loop():
    recorder = Recorder()
    assert drain(jax.jit(lambda x: halve(recorder, 5, x, 12)), 1.0) == 2.0**-12
    assert recorder.calls == [
        ("update", 5, {"x": 2.0**-5}),
        ("update", 10, {"x": 2.0**-10}),
        ("update", 12, {"x": 2.0**-12}),
        ("close", "done"),
    ]


def test_compiled_batch_reports_the_lane_that_runs_longest():
    recorder = Recorder()
    x, steps = jnp.array([1.0, 3.0, 5.0]), jnp.array([3, 22, 12])
    run = jax.jit(jax.vmap(lambda x, steps: halve(recorder, 5, x, steps)))
    np.testing.assert_array_equal(drain(run, x, steps), x / 2.0**steps)
    assert recorder.steps == [5, 10, 15, 20, 22]
    assert recorder.calls[-3:] == [
        ("update", 20, {"x": 3 * 2.0**-20}),
        ("update", 22, {"x": 3 * 2.0**-22}),
        ("close", "done"),
    ]


def test_compiled_nested_batch_and_unbatched_parts():
    recorder = Recorder()
    inner = jax.vmap(lambda x, steps: halve(recorder, 4, x, steps), in_axes=(None, 0))
    run = jax.jit(jax.vmap(inner, in_axes=(0, None)))
    out = drain(run, jnp.array([1.0, 2.0]), jnp.array([1, 9]))
    np.testing.assert_array_equal(out, [[0.5, 2.0**-9], [1.0, 2.0**-8]])
    assert recorder.steps == [4, 8, 9]
    recorder.calls.clear()
    # A batch that shares its step count.
    drain(jax.jit(jax.vmap(lambda x: halve(recorder, 4, x, 9))), jnp.array([1.0, 2.0]))
    assert recorder.steps == [4, 8, 9]
    assert recorder.calls[-1] == ("close", "done")


def test_compiled_reports_do_not_change_bits_and_silence_costs_nothing():
    def run(progress):
        return jax.jit(jax.vmap(lambda x, steps: halve(progress, 1, x, steps)))

    x, steps = jnp.linspace(0.1, 1.0, 7), jnp.arange(7) * 3
    plain = drain(run(None), x, steps)
    np.testing.assert_array_equal(plain, drain(run(Recorder()), x, steps))
    silent = run(Silent()).lower(x, steps).as_text()
    assert silent == run(None).lower(x, steps).as_text()
    assert "callback" in run(Recorder()).lower(x, steps).as_text()


def test_compiled_reports_under_derivatives():
    recorder = Recorder()

    def run(x, report=True):
        def body(x, step):
            if report:
                report_from_compiled(recorder, 5, step, {"x": x})
            return jnp.sin(x), None

        return jax.lax.scan(body, x, jnp.arange(11))[0]

    x = jnp.array([0.3, 1.0])
    with_reports = drain(jax.jit(jax.vmap(jax.grad(run))), x)
    np.testing.assert_array_equal(
        with_reports, jax.jit(jax.vmap(jax.grad(lambda x: run(x, False))))(x)
    )
    assert set(recorder.steps) == {0, 5, 10}


def test_compiled_loop_survives_a_failing_callable(caplog):
    def fails(step, x):
        raise RuntimeError("the user's mistake")

    run = jax.jit(lambda x: halve(fails, 1, x, 6))
    assert drain(run, 1.0) == 2.0**-6
    # `report` and `close` each resolved the callable for themselves; resolve once to log once.
    assert 1 <= len(caplog.records) <= 2
    caplog.clear()
    progress = resolve(fails)
    run = jax.jit(lambda x: halve(progress, 1, x, 6))
    assert drain(run, 1.0) == drain(run, 1.0) == 2.0**-6
    assert len(caplog.records) == 1


def test_compiled_bar_shows_the_last_step():
    file = io.StringIO()
    bar = ProgressBar("text", file, clock=lambda: 0.0)
    run = jax.jit(lambda x: halve(bar, 1, x, 40))
    drain(run, 1.0)
    drain(run, 1.0)
    lines = file.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:]
    assert lines[0].startswith("step 1 ")
    assert lines[1].startswith("step 40 ")


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"x": jnp.ones(2)}, "x is float64 of shape"),
        ({"x": 1j}, "x is complex128"),
        ({"step": 1.0}, "rename"),
    ],
)
def test_compiled_report_refuses(scalars, message):
    with pytest.raises(ValueError, match=message):
        report_from_compiled(Recorder(), 1, 1, scalars)


def test_compiled_report_refuses_every_below_one():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        report_from_compiled(Recorder(), 0, 1, {})
