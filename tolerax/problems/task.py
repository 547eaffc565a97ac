"""What a worker runs: one point, with a deadline, and an answer that always travels back."""

import os
import platform
import threading
import traceback
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from tolerax.problems.python_code import Row, Wanted, call

# A Dask worker goes this long after a deadline: until then the news of it has left.
GRACE = 1.0


class PointTimeoutError(Exception):
    """The function gave no value before its deadline."""


class Raised(NamedTuple):
    """What the function raised instead of a value."""

    error: BaseException
    text: str


def here() -> str:
    """The name of this process among those of all machines."""
    return f"{platform.node()} {os.getpid()}"


def loads(fun: Callable) -> None:
    """Arrives at a worker if `fun` does."""
    del fun


def task(
    fun: Callable, x: PyTree, wanted: Wanted, deadline: float | None, home: str
) -> Row | Raised:
    """Evaluate one point, at home or away; whatever `fun` raises is returned.

    Raises `PointTimeoutError`, and nothing else, so that every other exception of a future is the
    doing of the executor. (Raised, not returned: Dask keeps results on the worker, which goes.)
    """
    away = here() != home
    if deadline is None:
        return _guarded(fun, x, wanted, away)
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(_guarded(fun, x, wanted, away)), daemon=True
    )
    thread.start()
    thread.join(deadline)
    if not answers:
        if away:
            _leave_a_dask_cluster()
        raise PointTimeoutError
    return answers[0]


def _guarded(fun: Callable, x: PyTree, wanted: Wanted, away: bool) -> Row | Raised:
    try:
        row = call(fun, x, wanted)
        return row._replace(gradient=jax.tree.map(np.asarray, row.gradient)) if away else row
    except (Exception, SystemExit) as error:
        return _raised(error, away)


def _raised(error: Exception | SystemExit, away: bool) -> Raised:
    text = f"{type(error).__name__}: {error}"
    if not away:
        return Raised(error, text)
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"It was raised on a worker:\n{trace}")
    # That a worker ends is no reason for the whole program to end.
    if isinstance(error, SystemExit) or not _travels(error):
        error = RuntimeError(f"{text}\nIt was raised on a worker:\n{trace}")
    return Raised(error, text)


def _travels(error: Exception) -> bool:
    """Whether an exception can be sent; otherwise it would break the executor on its way."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # pyright: ignore
    except Exception:
        return False
    return True


def _leave_a_dask_cluster() -> None:
    """End this process if it is a Dask worker that will be restarted: the function that hangs in it
    cannot be stopped. A member of a process pool would take the pool with it."""
    try:
        from distributed import get_worker  # pyright: ignore[reportMissingImports]

        if getattr(get_worker(), "nanny", None) is None:
            return
    except (ImportError, ValueError):
        return
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()
