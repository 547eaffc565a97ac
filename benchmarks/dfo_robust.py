"""CUTEst problems whose values carry noise or are missing, beside COBYQA and Py-BOBYQA, scored as
OptiProfiler scores: by the areas under performance profiles of what was truly reached.

Source: Huang, Ragonneau, Zhang, "OptiProfiler: a platform for benchmarking optimization solvers"
(www.optprof.com), for the features `noisy` and `random_nan` and the score.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks import cutest
from benchmarks.frame import Bar, Group, Measured, Settings

NOISE, MISSING = 1e-3, 0.05
TOLERANCES = 10.0 ** -np.arange(1, 11)
FEATURES = ("noisy", "random_nan")
LARGEST = 10
RUNS = 2
QUICK = 20


class Case(NamedTuple):
    """A function of a vector, without noise, where to start, and the bounds."""

    name: str
    value: Callable[[np.ndarray], float]
    x0: np.ndarray
    low: np.ndarray
    high: np.ndarray


def cases(which: slice = slice(None)) -> list[Case]:
    """Unconstrained and bounded problems with at most 10 variables whose start has a value, in
    alphabetical order. Tuned on every other one, `slice(1, None, 2)`."""
    library = cutest.library()
    every = [*library.unconstrained_minimisation_problems, *library.bounded_minimisation_problems]
    named = sorted({type(problem).__name__: problem for problem in every}.items())
    small = [(name, problem) for name, problem in named if _size(problem) <= LARGEST]
    found = [_case(name, problem) for name, problem in small[which]]
    return [case for case in found if np.isfinite(case.value(case.x0))]


def _size(problem: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: problem.y0)))


def _case(name: str, problem: Any) -> Case:
    start = np.asarray(problem.y0, float)
    sides = getattr(problem, "bounds", None) or (-np.inf, np.inf)
    low, high = (np.broadcast_to(np.asarray(side, float), start.shape) for side in sides)
    compiled = jax.jit(lambda x: problem.objective(x, problem.args))
    # Py-BOBYQA wants room in every variable.
    free = low < high
    x0 = np.clip(start, low, high)

    def value(x: np.ndarray) -> float:
        whole = x0.copy()
        whole[free] = x
        return float(compiled(whole))

    return Case(name, value, x0[free], low[free], high[free])


class SpentError(Exception):
    """No evaluations are left."""


class Observed:
    """What a solver is told of a case: values with noise, or some of them missing. `truth` keeps
    those without. What is told depends on the run and the point alone, so that no solver can
    average noise away by asking again."""

    def __init__(self, case: Case, feature: str, run: int):
        self.case, self.feature, self.run = case, feature, run
        self.budget = 100 * (case.x0.size + 1)
        self.truth: list[float] = []

    def __call__(self, x: np.ndarray) -> float:
        if len(self.truth) >= self.budget:
            raise SpentError
        x = np.asarray(x, float)
        value = self.case.value(x)
        self.truth.append(value)
        random = np.random.default_rng([self.run, *x.view(np.uint32).tolist()])
        if self.feature == "noisy":
            return value + NOISE * max(1.0, abs(value)) * random.standard_normal()
        return float("nan") if random.uniform() < MISSING else value


def ours(solver: tolerax.Solver, fun: Observed) -> None:
    """One of our solvers."""
    bounds = (jnp.asarray(fun.case.low), jnp.asarray(fun.case.high))
    problem = tolerax.Objective(fun, host=True, bounds=bounds, on_error="fail")
    x0, key = jnp.asarray(fun.case.x0), jax.random.key(fun.run)
    limit = {"points": fun.budget}
    tolerax.solve(problem, solver, x0, key=key, max_steps=fun.budget, max_work=limit)


def cobyqa(fun: Observed) -> None:
    """COBYQA, SciPy's."""
    from scipy.optimize import Bounds, minimize

    low: Any = fun.case.low
    high: Any = fun.case.high
    bounds, options = Bounds(low, high), {"maxfev": fun.budget}
    minimize(fun, fun.case.x0, method="COBYQA", bounds=bounds, options=options)


def bobyqa(fun: Observed) -> None:
    """Py-BOBYQA, told that there is noise, so that it restarts. A missing value would end it: it
    sees the highest one so far instead."""
    import pybobyqa

    highest = 0.0

    def present(x: np.ndarray) -> float:
        nonlocal highest
        value = fun(x)
        highest = max(highest, value)
        return highest if np.isnan(value) else value

    np.random.seed(fun.run)  # noqa: NPY002 - the peer draws from the global generator
    x0, low, high = fun.case.x0, fun.case.low, fun.case.high
    # Its own default, unless the bounds are nearer.
    radius = min(0.1 * max(np.max(np.abs(x0)), 1.0), 0.5 * np.min(high - low))
    pybobyqa.solve(
        present,
        x0,
        bounds=(np.maximum(low, -1e20), np.minimum(high, 1e20)),
        rhobeg=radius,
        maxfun=fun.budget,
        objfun_has_noise=True,
        do_logging=False,
    )


OURS = "ModelTrustRegion(explore=True)"
METHODS: dict[str, Callable[[Observed], None]] = {
    OURS: lambda fun: ours(tolerax.ModelTrustRegion(explore=True), fun),
    "COBYQA": cobyqa,
    "Py-BOBYQA": bobyqa,
}


def reached(method: Callable[[Observed], None], case: Case, feature: str, run: int) -> np.ndarray:
    """The lowest true value of the first 1, 2, ... points."""
    fun = Observed(case, feature, run)
    # What a peer raises at a missing value ends its run.
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        method(fun)
    truth = np.asarray([case.value(case.x0)] if not fun.truth else fun.truth)
    return np.minimum.accumulate(np.where(np.isnan(truth), np.inf, truth))


def work(lowest: list[np.ndarray], first: float, least: float) -> np.ndarray:
    """Points of each method until the value is within each of `TOLERANCES` of the way from the
    first to the least."""
    goals = np.maximum(TOLERANCES * first + (1 - TOLERANCES) * least, least)
    rows = []
    for values in lowest:
        hit = values[None] <= goals[:, None]
        rows.append(np.where(hit.any(1), 1.0 + hit.argmax(1), np.inf))
    return np.asarray(rows)


def areas(points: np.ndarray) -> np.ndarray:
    """The area below the performance profile of each method, over the logarithm to base 2 of the
    ratio to the quickest, up to 1.1 times the largest one; `points` has an axis for problems and
    runs, one for methods and one for tolerances. The mean over tolerances."""
    quickest = points.min(axis=1, keepdims=True)
    ratio = np.where(np.isfinite(points), points, 1) / np.where(np.isfinite(quickest), quickest, 1)
    ratio = np.where(np.isfinite(points), ratio, np.inf)
    largest = np.where(np.isfinite(ratio), ratio, 1).max(axis=(0, 1))
    width = 1.1 * np.maximum(np.log2(largest), np.finfo(float).eps)
    # A problem adds to the profile from its ratio on.
    rest = np.maximum(width - np.log2(ratio), 0)
    return rest.mean(axis=0).mean(axis=-1)


def measure(settings: Settings) -> dict[str, Measured]:
    """Every other problem, those that nothing was tuned on, in two runs each; in a quick run 20 of
    them, once."""
    rows = cases(slice(0, None, 2))
    rows = rows[:: len(rows) // QUICK][:QUICK] if settings.quick else rows
    runs = settings.seeds[: 1 if settings.quick else RUNS]
    gaps, detail = [], {}
    for feature in FEATURES:
        points = []
        for number, case in enumerate(rows):
            found = {
                (name, run): reached(method, case, feature, run)
                for run in runs
                for name, method in METHODS.items()
            }
            first = case.value(case.x0)
            least = min(first, *(values.min() for values in found.values()))
            points += [work([found[name, run] for name in METHODS], first, least) for run in runs]
            if number % 10 == 9:
                settings.tell(f"   {feature}: {number + 1} of {len(rows)} problems")
        told = np.asarray(points)
        scores = dict(zip(METHODS, areas(told).tolist(), strict=True))
        shares = np.isfinite(told).mean(axis=0)
        for name, share in zip(METHODS, shares, strict=True):
            solved = " ".join(f"{one:.2f}" for one in share)
            settings.tell(f"   {feature} {name}: score {scores[name]:.3f}, solved {solved}")
        gaps.append(scores[OURS] - max(score for name, score in scores.items() if name != OURS))
        detail[feature] = {
            "scores": scores,
            "solved": dict(zip(METHODS, shares.tolist(), strict=True)),
        }
    return {"robust_score": Measured(gaps, min(gaps), {"problems": len(rows), **detail})}


GROUP = Group(
    "robust",
    (
        Bar(
            "robust_score",
            ">=",
            0.0,
            "area of the performance profile minus the better of COBYQA's and Py-BOBYQA's: values "
            "with noise, values missing",
        ),
    ),
    measure,
)
