"""A run that kills its own process (signal 9) in the middle: `python -m ... SOLVER CHECKPOINT`."""

import os
import signal
import sys

import jax.numpy as jnp

from tests.conformance import zoo

START = (-1.2, 1.0)
KILLED_AT = 7
_calls = _limit = 0


def fun(x):
    """Rosenbrock's function; the process dies at call number `_limit`."""
    global _calls
    _calls += 1
    if _calls == _limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return zoo.rosenbrock(x)


def problem_to_kill(limit):
    """The same problem to a checkpoint, whether it kills or not."""
    global _calls, _limit
    _calls, _limit = 0, limit
    return zoo.python_objective("rosenbrock", fun=fun)


if __name__ == "__main__":
    # Under its own name: the checkpoint knows a function by module and name.
    from tests.conformance import killed
    from tests.conformance.registry import SOLVERS
    from tolerax.checkpoint import Checkpoint

    entry = next(entry for entry in SOLVERS if entry.name == sys.argv[1])
    zoo.run(
        killed.problem_to_kill(KILLED_AT),
        entry.solver(),
        jnp.asarray(START),
        checkpoint=Checkpoint(sys.argv[2], every_steps=1),
    )
