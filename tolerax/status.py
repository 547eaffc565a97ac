"""How a run ended ([`Status`][]) and how one evaluation went ([`PointStatus`][])."""

import functools
import operator
from typing import TYPE_CHECKING, Any

import equinox as eqx
from jaxtyping import Array, Bool


class PointStatus(eqx.Enumeration):
    """The outcome of one evaluation. Failures are marked with these, never raised."""

    ok = ""
    inaccurate = "The inner solve ran out of iterations before it reached the requested accuracy."
    floor = "Rounding keeps the inner solve from the requested accuracy."
    failed = (
        "The value or the gradient is not finite, the evaluation raised, or it killed its worker."
    )
    timed_out = "The evaluation gave no value before its deadline."
    contradicted = (
        "What was seen contradicts a constant of the problem (for instance, the lower level has "
        "less curvature than `strong_convexity` says, or an equation is less stable than "
        "`stability` says)."
    )


class Status(eqx.Enumeration):
    """Why a run ended. Each message says what to do next."""

    running = "The run has not ended; pass its `state` to `solve` to continue."
    converged = (
        "Converged: the stopping criterion holds with its error bound, was checked again at the "
        "returned point, and rests on exact evaluations or on given and proved constants only."
    )
    converged_estimated = (
        "Converged with estimated constants: the stopping criterion holds and was checked again, "
        "but at least one constant in its error bound is an estimate (see `provenance`). Give or "
        "prove the constants to certify the result."
    )
    consensus = (
        "Consensus: the particles agree, and probes around the point at all distances up to the "
        "spread of the start found no lower value. That is no proof of a global minimum: run again "
        "with another key or more particles to see whether it holds."
    )
    sampled = (
        "Sampled: the ensemble in `solution.state.solver_state` (`ensemble`, `mean`, `covariance`) "
        "is a sample of the density that the solver describes, as well as its size and method "
        "allow. `x` is its best point, not its mean."
    )
    accuracy_floor = (
        "Accuracy floor: rounding keeps the error bounds above what the stopping criterion asks. "
        "Use float64, rescale the problem, or ask for a larger tolerance."
    )
    budget = (
        "Budget spent (`max_steps`, `max_work`; `maxiter`, `maxfun` of `minimize`): raise it, or "
        "continue from `state`."
    )
    time = "Time spent (`max_seconds`): raise it, or continue from `state`."
    stalled = (
        "Stalled: no step gave a decrease that could be told from the errors of the values. Check "
        "the scaling of the variables, or accept the point; begin again with more particles "
        "(`solve_with_restarts`) where the solver has a population."
    )
    not_reproduced = (
        "The stopping criterion held once but not when it was checked again at the returned point: "
        "the objective is not deterministic, or its errors are larger than their bounds."
    )
    inner_failed = (
        "Inner solve failed: the lower-level or state solve did not reach the accuracy that a step "
        "needs. Raise its iteration limit or use another inner solver; or a preconditioner or a "
        "`metric` is not positive definite: check its sign."
    )
    contradicted = (
        "A constant given for the problem is contradicted by what was seen in the run: check those "
        "that `provenance` calls given or proved (of a bilevel problem `strong_convexity` and "
        "`self_concordance` first, of an equation `stability`), or leave them out to have them "
        "estimated."
    )
    non_finite_start = (
        "The start is not finite, or the value or gradient there is not: choose another `x0`."
    )
    all_failed = "Every evaluation failed: check the objective at the start point."
    gradient_inconsistent = (
        "Gradient inconsistent: differences of values disagree with the gradient by more than "
        "their error bounds. Check the derivative with finite differences."
    )
    unbounded = (
        "Unbounded: the values fall without limit. Add bounds or a regularizer to the problem."
    )
    infeasible = (
        "Infeasible: no point that satisfies the constraints was found, or a lower bound is above "
        "its upper bound, or is NaN."
    )
    worker_lost = (
        "Workers were lost and could not be replaced (the log says why): give `executor` as a "
        "number of processes or as a callable that makes an executor, and continue from `state`."
    )
    stopped = "Stopped by the user (StopIteration from the callback)."

    if TYPE_CHECKING:
        _value: Any


FAILED = (PointStatus.failed, PointStatus.timed_out)
CONVERGED = (
    Status.converged,
    Status.converged_estimated,
    Status.consensus,
    Status.sampled,
)


def is_success(status: Any) -> Bool[Array, "*batch"]:
    """Whether a status claims that the stopping criterion holds.

    >>> bool(is_success(Status.converged)), bool(is_success(Status.budget))
    (True, False)
    """
    return functools.reduce(operator.or_, [status == one for one in CONVERGED])


def is_failed(status: Any) -> Bool[Array, "*batch"]:
    """Whether the status of a point says that there is no value.

    >>> bool(is_failed(PointStatus.timed_out)), bool(is_failed(PointStatus.inaccurate))
    (True, False)
    """
    return functools.reduce(operator.or_, [status == one for one in FAILED])
