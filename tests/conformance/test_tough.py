"""Objectives that lie, fail and jump: nothing may crash, hang or claim what is not so.

After the "tough" tests of PRIMA: start and bounds moved by 20 %, values with 20 % multiplicative
noise, and at random points an exception (5 %), NaN (5 %), +inf (10 %) or -1e30 (5 %). What happens
at a point follows from a hash of the seed and the point, so that every run can be repeated.
"""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conformance import zoo
from tests.conformance.registry import SEARCHES, SOLVERS
from tolerax.minimize import CODES

SEEDS = 100
POINTS = 30
every_solver = pytest.mark.parametrize("entry", [*SOLVERS, *SEARCHES], ids=str)


class Tough:
    """The quadratic of the zoo, ill-treated."""

    def __init__(self, seed):
        self.seed = seed
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        digest = hashlib.sha256(np.int64(self.seed).tobytes() + x.tobytes()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        lot = rng.uniform()
        if lot < 0.05:
            raise ArithmeticError("tough luck")
        if lot < 0.10:
            return np.nan
        if lot < 0.20:
            return np.inf
        if lot < 0.25:
            return -1e30
        return (1 + zoo.quadratic(x)) * (1 + 0.2 * rng.uniform(-1, 1))


def setting(seed):
    """The function, its problem, the start and the bounds of a seed."""
    rng = np.random.default_rng(seed)
    moved = lambda x: np.asarray(x) * (1 + 0.2 * rng.uniform(-1, 1, 2))  # noqa: E731
    known = zoo.PROBLEMS["half_bounded" if seed % 2 else "quadratic"]
    lower, upper = np.sort([moved(known.lower), moved(known.upper)], axis=0)
    start = np.clip(moved(known.start), lower, upper)
    fun = zoo.Recorded(Tough(seed))
    bounds = (jnp.asarray(lower), jnp.asarray(upper))
    problem = zoo.python_objective("quadratic", fun=fun, bounds=bounds, on_error="fail")
    return fun, problem, start, bounds


@every_solver
def test_tough_objectives_do_no_harm(entry):
    ends = set()
    for seed in range(SEEDS):
        fun, problem, start, (lower, upper) = setting(seed)
        limit = {"points": POINTS}
        solution = zoo.run(problem, entry.solver(), jnp.asarray(start), max_work=limit)
        name = zoo.name_of(solution.status)
        ends.add(name)
        assert name in CODES
        assert fun.fun.calls == int(solution.work.points) <= POINTS
        x, value = np.asarray(solution.x), float(solution.value)
        assert np.all((x >= lower) & (x <= upper))
        assert all(np.all((p >= lower) & (p <= upper)) for p in fun.points)
        assert not np.isnan(value)
        # The best value seen, to the few ulps within which the smaller gradient wins.
        assert value <= fun.best + 4e-15 * abs(fun.best)
        if np.isfinite(value):
            assert value == Tough(seed)(x)
        if solution.success:
            gradient = zoo.quadratic_gradient(x)
            assert zoo.stationarity(gradient, x, lower, upper) <= 1e-5
        failures = sum(not v < np.inf for v in fun.values)
        assert int(solution.state.failures) == failures
    # Faults came early and late, so that runs ended in more than one way.
    assert len(ends) > (2 if entry in SOLVERS else 1)


@every_solver
def test_a_tough_run_can_be_repeated(entry):
    for seed in (3, 14, 15):
        runs = []
        for _ in range(2):
            fun, problem, start, _ = setting(seed)
            zoo.run(problem, entry.solver(), jnp.asarray(start), max_work={"points": POINTS})
            runs.append(np.asarray(fun.points))
        np.testing.assert_array_equal(*runs)
