"""The journal of evaluations: nothing lost by a kill, nothing believed that was not written."""

import functools
import json
import os
import signal
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.problems import journaled
from tests.problems.simulators import bowl
from tolerax import Accuracy, Objective, Query, Workers
from tolerax.errors import JournalError
from tolerax.problems.journal import Journal, decoded, encoded
from tolerax.problems.python_code import Row, Wanted

VALUES = Wanted(None, 0, None, 1.0)
POINTS = [np.array([float(i), 1.0]) for i in range(4)]
VALUES_AT = [np.pi, np.nan, -np.inf, 5e-324]


def awkward(x):
    return VALUES_AT[int(x[0])]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "tests.problems.journaled", str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = (tmp_path / "journal").read_bytes().splitlines()
    assert len(lines) == journaled.KILLED_AT  # the head, and every value that was there
    solution, calls, workers = journaled.run(tmp_path)
    points = int(solution.work.points)
    assert points == journaled.SOLVER.particles * journaled.STEPS
    assert calls == points - (journaled.KILLED_AT - 1) == workers.counts["evaluated"]
    assert workers.counts["replayed"] == journaled.KILLED_AT - 1
    # The function is random: only the journal can repeat the whole run.
    again, calls, _ = journaled.run(tmp_path)
    assert calls == 0
    np.testing.assert_array_equal(again.x, solution.x)
    assert float(again.value) == float(solution.value)
    assert int(again.work.points) == points


def test_every_bit_of_values_and_gradients_comes_back(tmp_path):
    path = tmp_path / "journal"

    def fun(x):
        return np.sin(x["a"]) + x["b"].sum()

    def slope(x):
        return {"a": np.cos(x["a"]), "b": np.ones_like(x["b"])}

    batch = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([[[1.0]], [[3e-310]]])}
    query = Query(batch, Accuracy(1.0, 1.0), mask=jnp.ones(2, bool))
    first = Objective(fun, gradient=slope, host=True).on(Workers(journal=path))
    one = first.evaluate(query)
    first.close()
    workers = Workers(journal=path)
    second = Objective(fun, gradient=slope, host=True).on(workers)
    two = second.evaluate(query)
    second.close()
    for a, b in ((one.value, two.value), *((one.gradient[k], two.gradient[k]) for k in "ab")):
        np.testing.assert_array_equal(np.asarray(a).view(np.int64), np.asarray(b).view(np.int64))
    assert int(two.work.points) == 2
    assert int(two.work.gradients) == 2
    assert workers.counts == {"replayed": 2}


def test_failures_come_back_as_failures(tmp_path):
    def raises(x):
        raise ArithmeticError("burst")

    for fun, outcome in ((raises, "raised"), (awkward, "answered")):
        path = tmp_path / outcome
        with Workers(journal=path) as workers:
            rows = workers.evaluate(fun, POINTS, VALUES, "fail")
        workers = Workers(journal=path)
        again = workers.evaluate(fun, POINTS, VALUES, "fail")
        assert [row.outcome for row in again] == [outcome] * 4
        np.testing.assert_array_equal([r.value for r in again], [r.value for r in rows])
        assert workers.counts == {"replayed": 4}
        assert [row.error for row in again] == [row.error for row in rows]


def test_cache_and_journal_together(tmp_path):
    calls = []

    def fun(x):
        calls.append(1)
        return bowl(x)

    for expected in (2, 2):
        workers = Workers(journal=tmp_path / "journal", cache=True)
        rows = workers.evaluate(fun, [POINTS[0], POINTS[1], POINTS[0]], VALUES)
        rows += workers.evaluate(fun, [POINTS[1]], VALUES)
        workers.close()
        assert [row.calls for row in rows] == [1, 1, 0, 0]
        assert len(calls) == expected


def written(path, fun=awkward):
    workers = Workers(journal=path)
    rows = workers.evaluate(fun, POINTS, VALUES)
    workers.close()
    return rows


def test_a_last_line_that_was_torn_is_dropped_at_every_byte(tmp_path, caplog):
    path = tmp_path / "journal"
    written(path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path, json.loads(whole.splitlines()[0][9:])["identity"], awkward)
        journal.close()
        kept = sum(end <= size for end in ends)
        assert len(journal.records) == max(kept - 1, 0)
        assert path.read_bytes() == whole[: ends[max(kept, 1) - 1]]
        assert (size in (0, *ends)) == ("torn" not in caplog.text)
        caplog.clear()


@settings(max_examples=100)
@given(st.data())
def test_mutations_are_refused_or_lose_the_last_value_only(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "journal"
    right = written(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["flip", "delete", "insert", "cut", "repeat"]))
        if change == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "delete":
            del content[place]
        elif change == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        elif change == "cut":
            del content[place:]
        else:
            content += content[place:]
        if not content:
            break
    path.write_bytes(content)
    workers = Workers(journal=path)
    try:
        rows = workers.evaluate(awkward, POINTS, VALUES)
    except JournalError:
        return
    np.testing.assert_array_equal([row.value for row in rows], [row.value for row in right])
    # One value at most is missing, unless the file was cut.
    assert workers.counts["replayed"] + workers.counts["evaluated"] == 4


HOSTILE = [
    {"nth": []},
    {"nth": True},
    {"key": 3},
    {"value": 1.0},
    {"value": "0x1p99999"},
    {"value": None},
    {"calls": -1},
    {"calls": 1.5},
    {"outcome": "fine"},
    {"outcome": []},
    {"error": 3},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_records_that_are_none_are_refused(tmp_path, change):
    path = tmp_path / "journal"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = encoded(decoded(lines[1]) | change)
    path.write_bytes(b"".join(lines))
    with pytest.raises(JournalError, match="holds a record that is none"):
        written(path)


def test_gradients_that_do_not_fit_are_refused(tmp_path):
    path, wanted = tmp_path / "journal", Wanted(np.zeros_like, 1, None, 1.0)
    Workers(journal=path).evaluate(bowl, POINTS[:1], wanted)
    head, line = path.read_bytes().splitlines(keepends=True)
    for wrong in (None, [], ["AAAA"], ["AAAA", "AAAA"], ["!"], [3], {"a": 1}):
        path.write_bytes(head + encoded(decoded(line) | {"gradient": wrong}))
        with pytest.raises(JournalError, match="holds a record that is none"):
            Workers(journal=path).evaluate(bowl, POINTS[:1], wanted)


def test_hostile_json_is_no_record():
    for content in (b"[" * 100_000, b"3", b"\xff", b'{"a": NaN}' * 2):
        assert decoded(b"%08x %b\n" % (zlib.crc32(content), content)) is None
    assert decoded(encoded({"a": [1]})) == {"a": [1]}


def scaled(x, by):
    return by * bowl(x)


def make(version):
    """Functions of one name."""
    if version == 1:
        return lambda x: bowl(x) + 1.0
    if version == 2:
        return lambda x: bowl(x) + 2.0
    return lambda x: bowl(-x) + 1.0


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal"
    written(path, functools.partial(scaled, by=2.0))
    written(path, functools.partial(scaled, by=2.0))
    for other in (functools.partial(scaled, by=3.0), scaled, bowl):
        with pytest.raises(JournalError, match=r"another function or problem \(.*partial"):
            written(path, other)
    with pytest.raises(JournalError, match="another function or problem"):
        Workers(journal=path).evaluate(
            functools.partial(scaled, by=2.0), POINTS, VALUES._replace(bounds=(0.0, 1.0))
        )
    path = tmp_path / "edited"
    written(path, make(1))
    written(path, make(1))
    for version in (2, 3):
        with pytest.raises(JournalError, match="another function"):
            written(path, make(version))


def test_files_that_are_no_journals_are_left_alone(tmp_path):
    path = tmp_path / "data.csv"
    for content in (b"a,b\n1,2\n", b"a", encoded({"format": 1}), b"\0" * 99):
        path.write_bytes(content)
        with pytest.raises(JournalError, match="is not a journal"):
            written(path)
        assert path.read_bytes() == content
    path.write_bytes(encoded({"tolerax_journal": 2, "identity": ""}))
    with pytest.raises(JournalError, match="format 2 by a newer version"):
        written(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(JournalError, match="links are not followed"):
        written(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing/journal", "."):
        with pytest.raises(JournalError, match=r"not a regular file|cannot be opened"):
            written(tmp_path / name)


def test_one_journal_belongs_to_one_run_at_a_time(tmp_path):
    path = tmp_path / "journal"
    one = Workers(journal=path)
    one.evaluate(bowl, POINTS[:2], VALUES)
    with pytest.raises(JournalError, match="another run is writing"):
        written(path, bowl)
    one.close()
    written(path, bowl)
    with pytest.raises(JournalError, match="changed since this run"):
        one.evaluate(bowl, POINTS[2:], VALUES)


def test_points_that_killed_their_workers_stay_known(tmp_path):
    path = tmp_path / "journal"
    written(path, bowl)
    head, *lines = path.read_bytes().splitlines(keepends=True)
    lost = decoded(lines[2]) | {"outcome": "lost", "value": "nan"}
    path.write_bytes(head + b"".join([*lines[:2], encoded(lost)]))
    workers = Workers(journal=path)
    for calls in (1, 0):
        row = workers.evaluate(bowl, POINTS[2:3], VALUES)[0]
        assert row.outcome == "lost"
        assert row.calls == calls
    assert workers.counts["evaluated"] == 0
    assert isinstance(row, Row)


def test_a_full_disk_is_an_error_and_damages_nothing(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    journal = Journal(path, "", bowl)
    journal.append({"a": 1})
    before = path.read_bytes()

    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
    with pytest.raises(JournalError, match="cannot be written"):
        journal.append({"a": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
