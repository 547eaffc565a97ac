"""Exceptions. Failures of a run are statuses; these are for input that cannot be run, for code of
the user that raises, and for `solve(..., throw=True)`."""

from typing import Any


class SolveError(RuntimeError):
    """Raised by `solve(..., throw=True)` when the run did not converge; see `solution`."""

    def __init__(self, message: str, solution: Any):
        super().__init__(message)
        self.solution = solution


class EvaluationError(RuntimeError):
    """The objective raised. `solution` holds the best point so far, `__cause__` the exception."""

    def __init__(self, message: str, solution: Any):
        super().__init__(message)
        self.solution = solution


class WorkersLostError(RuntimeError):
    """Raised by an evaluation whose workers are lost and cannot be replaced. `solve` ends the run
    with `Status.worker_lost`."""


class JournalError(ValueError):
    """The journal of `Workers` cannot be written, or must not be read; the message says why and
    what to do."""
