"""Whatever interrupts a save leaves a checkpoint that loads."""

import collections
import errno
import functools
import os
import signal
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.states import bits
from tolerax import checkpoint as module
from tolerax.checkpoint import Checkpoint, CheckpointError

# A kill, or an error, at any system call


class Killed(BaseException):
    pass


class FaultyFile:
    def __init__(self, file, call):
        self.file, self.call = file, call

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        # Half of it may have been written.
        self.call(lambda: self.file.write(data), lambda: self.file.write(data[: len(data) // 2]))
        return len(data)

    def flush(self):
        self.call(self.file.flush)


class FaultyOs:
    """The module os, in which the n-th call raises; after a kill all later ones do too."""

    CALLS = ("open", "fsync", "replace", "unlink", "listdir", "close")

    def __init__(self, fatal_call, error):
        self.fatal_call = fatal_call
        self.error: Any = error
        self.calls = 0
        self.names = []

    def call(self, function, before=lambda: None):
        self.calls += 1
        self.names.append(getattr(getattr(function, "func", None), "__name__", "write"))
        dead = self.error is Killed and self.calls > self.fatal_call
        if dead or self.calls == self.fatal_call:
            if not dead:
                before()
            raise self.error
        return function()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real
        return lambda *args: self.call(functools.partial(real, *args))

    def fdopen(self, *args):
        return FaultyFile(os.fdopen(*args), self.call)


@pytest.mark.parametrize("error", [Killed, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fault_at_every_system_call(tmp_path, monkeypatch, caplog, error):
    template = {"x": jnp.zeros(5), "n": 0}
    state = [{"x": jnp.full(5, float(n)), "n": n} for n in range(5)]
    outcomes = collections.Counter()
    for fatal_call in range(1, 200):
        folder = tmp_path / str(fatal_call)
        folder.mkdir()
        checkpoint = Checkpoint(folder / "run", keep=2)
        for n in (1, 2):
            checkpoint.save(state[n])
        faulty = FaultyOs(fatal_call, error)
        outcome, message = "saved", ""
        with monkeypatch.context() as patched:
            patched.setattr(module, "os", faulty)
            try:
                checkpoint.save(state[3])
            except Killed:
                outcome = "killed"
            except CheckpointError as raised:
                outcome = "refused"
                message = str(raised)
        if faulty.calls < fatal_call:
            break
        # What a new process finds.
        after = Checkpoint(folder / "run", keep=2)
        loaded, _ = after.load(template)
        assert bits(loaded) in (bits(state[2]), bits(state[3]))
        is_new = loaded["n"] == 3
        outcomes[outcome, is_new] += 1
        if outcome == "saved":
            assert is_new
        before, _ = after.load(template, previous=True)
        assert bits(before) == bits(state[2 if is_new else 1])
        if outcome == "refused":
            assert "No space left" in message
        after.save(state[4])
        assert bits(after.load(template)[0]) == bits(state[4])
        assert len(after.files()) == 2
        assert not list(folder.glob(".*"))
    else:
        pytest.fail("saving never ended")
    if error is Killed:
        # Killed before the rename, and after it.
        assert set(outcomes) == {("killed", False), ("killed", True)}
    else:
        # After the rename the folder cannot be forced to disk (reported), or the old file cannot
        # be removed (logged).
        assert set(outcomes) == {("refused", False), ("refused", True), ("saved", True)}
        assert "old checkpoints cannot be removed" in caplog.text
    assert sum(outcomes.values()) > 15


def test_data_is_on_disk_before_its_name_and_the_name_before_old_files_go(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run", keep=1)
    checkpoint.save({"x": 1})
    calls = FaultyOs(0, Killed)
    calls.error = None  # only record
    monkeypatch.setattr(module, "os", calls)
    checkpoint.save({"x": 2})
    names = [name for name in calls.names if name not in ("write", "listdir")]
    # The file; the rename; the folder; the old file.
    assert names == ["open", "fsync", "replace", "open", "fsync", "close", "unlink"]


def test_two_runs_on_one_path_do_not_mix(tmp_path, monkeypatch):
    """A second run clears what the first is writing: the first is told, both stay loadable."""
    checkpoint = Checkpoint(tmp_path / "run")
    real_write = module._write

    def write_while_another_saves(file, manifest, described):
        monkeypatch.setattr(module, "_write", real_write)
        real_write(file, manifest, described)
        monkeypatch.setattr(module.os, "getpid", lambda: 1)
        Checkpoint(tmp_path / "run").save({"x": 2})

    monkeypatch.setattr(module, "_write", write_while_another_saves)
    with pytest.raises(CheckpointError, match="no other run uses this path"):
        checkpoint.save({"x": 1})
    assert checkpoint.load({"x": 0})[0] == {"x": 2}


SAVER = """
import sys
import numpy as np
from tolerax.checkpoint import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
n = checkpoint.load({"n": 0, "x": np.zeros(5000)})[0]["n"] if checkpoint.exists() else 0
while True:
    n += 1
    checkpoint.save({"n": n, "x": np.full(5000, float(n))})
"""


def test_kill_9(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    last = 0
    for delay in (0.03, 0.11, 0.2):
        newest = checkpoint.files()[-1:]
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path / "run")])
        try:
            deadline = time.monotonic() + 120
            while checkpoint.files()[-1:] == newest and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        loaded, _ = checkpoint.load({"n": 0, "x": np.zeros(5000)})
        assert loaded["n"] > last
        np.testing.assert_array_equal(loaded["x"], float(loaded["n"]))
        last = loaded["n"]
