"""A run with a journal whose process is killed (signal 9) at a call: `python -m ... FOLDER`."""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tolerax

KILLED_AT = 21
SOLVER, STEPS = tolerax.CBO(particles=8), 6


_calls = _limit = 0
_random = np.random.default_rng()


def noisy(x):
    """Another value at every call: only a journal can give one again. Kills its process at call
    number `_limit`."""
    global _calls
    _calls += 1
    if _calls == _limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(np.sum(x**2)) + _random.normal()


def run(folder, limit=0):
    """The run, and how often the function was called."""
    global _calls, _limit
    _calls, _limit = 0, limit
    problem = tolerax.Objective(noisy, host=True)
    workers = tolerax.Workers(journal=Path(folder) / "journal")
    solution = tolerax.solve(problem, SOLVER, jnp.ones(2), max_steps=STEPS, executor=workers)
    return solution, _calls, workers


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    # Under its own name: the journal knows a function by module and name.
    from tests.problems import journaled

    journaled.run(sys.argv[1], KILLED_AT)
