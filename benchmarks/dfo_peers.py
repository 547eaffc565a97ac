"""Peers of the derivative-free solvers, on functions in the box [-5, 5]^n: each returns the values
of its evaluations in order, at most `budget` of them."""

import contextlib
import warnings
from collections.abc import Callable

import numpy as np

BOUND = 5.0
Fun = Callable[[np.ndarray], float]


class _SpentError(Exception):
    pass


class Recorded:
    """A function that keeps its values and ends the run once the budget is spent."""

    def __init__(self, fun: Fun, budget: int):
        self.fun, self.budget, self.values = fun, budget, []

    def __call__(self, x: np.ndarray) -> float:
        if len(self.values) >= self.budget:
            raise _SpentError
        self.values.append(float(self.fun(np.asarray(x, float))))
        return self.values[-1]


def cobyqa(fun: Recorded, x0: np.ndarray, seed: int) -> None:
    """COBYQA, SciPy's."""
    from scipy.optimize import Bounds, minimize

    options = {"maxfev": fun.budget}
    minimize(fun, x0, method="COBYQA", bounds=Bounds(-BOUND, BOUND), options=options)


def bobyqa(fun: Recorded, x0: np.ndarray, seed: int) -> None:
    """Py-BOBYQA, which restarts where it ends early."""
    import pybobyqa

    np.random.seed(seed)  # noqa: NPY002 - the peer draws from the global generator
    box = (np.full_like(x0, -BOUND), np.full_like(x0, BOUND))
    pybobyqa.solve(
        fun, x0, bounds=box, maxfun=fun.budget, seek_global_minimum=True, do_logging=False
    )


def cma(fun: Recorded, x0: np.ndarray, seed: int) -> None:
    """pycma with a step length of 2, restarted with doubled populations while budget is left."""
    import cma as peer

    options = {"bounds": [-BOUND, BOUND], "maxfevals": fun.budget, "seed": seed + 1, "verbose": -9}
    peer.fmin2(fun, x0, 2.0, options, restarts=9, bipop=False)


def nomad(fun: Recorded, x0: np.ndarray, seed: int) -> None:
    """NOMAD 4: mesh-adaptive direct search with quadratic models."""
    low = np.full_like(x0, -BOUND)
    nomad_by(lambda x: [fun(x)], x0, (low, -low), 0, fun.budget, seed)


def nomad_by(
    outputs: Callable[[np.ndarray], list[float]],
    x0: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    constraints: int,
    budget: int,
    seed: int,
) -> None:
    """NOMAD on functions whose outputs are a value and that many constraints, which are not to be
    above 0 (progressive barrier)."""
    import PyNomad

    def block(point: "PyNomad.PyNomadEvalPoint") -> int:
        x = np.array([point.get_coord(i) for i in range(x0.size)])
        try:
            found = outputs(x)
        except _SpentError:
            return 0
        point.setBBO(" ".join(map(repr, found)).encode())
        return 1

    options = [
        " ".join(["BB_OUTPUT_TYPE OBJ", *["PB"] * constraints]),
        f"MAX_BB_EVAL {budget}",
        "DISPLAY_DEGREE 0",
        f"SEED {seed}",
    ]
    PyNomad.optimize(block, x0.tolist(), *(side.tolist() for side in bounds), options)


PEERS: dict[str, Callable[[Recorded, np.ndarray, int], None]] = {
    "COBYQA": cobyqa,
    "Py-BOBYQA": bobyqa,
    "CMA-ES": cma,
    "NOMAD": nomad,
}


def values_of(name: str, fun: Fun, x0: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """The values that a peer saw, in order."""
    recorded = Recorded(fun, budget)
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.suppress(_SpentError):
        warnings.simplefilter("ignore")
        PEERS[name](recorded, x0.copy(), seed)
    return np.asarray(recorded.values)
