"""Problems of Hock and Schittkowski with inequalities and bounds, beside SLSQP and trust-constr.

All with constraints and at most seven unknowns in sif2jax, with exact derivatives for all. A
problem is solved when, at the returned point, the largest violation is at most 1e-6, and so is what
remains of the gradient, relative to its largest entry where that is more than 1, after multipliers
of the right signs for constraints and bounds that are active to 1e-5; computed from outside. A
local solution counts. A claim of success is false where more than a hundred times that is left.
Evaluations are calls of the objective plus calls of the constraints.
"""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import tolerax
from benchmarks.dfo_constrained import Case, cases
from benchmarks.frame import Bar, Group, Measured, Settings

TOLERANCE, ACTIVE, MOST = 1e-6, 1e-5, 300


class Functions:
    """A case as functions with derivatives, and counts of their calls."""

    def __init__(self, case: Case):
        self.case, self.calls = case, 0
        self.value = lambda x: case.both(x)[0]
        self.rows = lambda x: case.both(x)[1]
        self._value, self._rows = jax.jit(self.value), jax.jit(self.rows)
        self._gradient, self._jacobian = (
            jax.jit(jax.grad(self.value)),
            jax.jit(jax.jacrev(self.rows)),
        )
        self._hessian = jax.jit(jax.hessian(self.value))
        self._bent = jax.jit(lambda x, v: jax.hessian(lambda x: v @ self.rows(x))(x))

    def fun(self, x: Any) -> float:
        self.calls += 1
        return float(self._value(x))

    def constraints(self, x: Any) -> np.ndarray:
        self.calls += 1
        return np.asarray(self._rows(x))

    def gradient(self, x: Any) -> np.ndarray:
        return np.asarray(self._gradient(x))

    def jacobian(self, x: Any) -> np.ndarray:
        return np.asarray(self._jacobian(x))

    def hessian(self, x: Any) -> np.ndarray:
        return np.asarray(self._hessian(x))

    def bent(self, x: Any, v: Any) -> np.ndarray:
        return np.asarray(self._bent(x, v))


def optimality(functions: Functions, x: np.ndarray) -> float:
    """The larger of violation and what remains of the gradient."""
    case = functions.case
    g, c = functions.gradient(x), np.asarray(functions.case.constraints(x))
    rows = np.concatenate([functions.jacobian(x), np.eye(x.size)])
    values = np.concatenate([c, x])
    low = np.concatenate([case.lower, case.low])
    high = np.concatenate([case.upper, case.high])
    # A gradient that points up at a lower side is held there by a negative multiplier.
    least = np.where(values <= low + ACTIVE, -np.inf, 0.0)
    most = np.where(values >= high - ACTIVE, np.inf, 0.0)
    used = (least < 0) | (most > 0)
    rest = g
    if used.any():
        found = scipy.optimize.lsq_linear(
            rows[used].T, -g, (least[used], most[used]), tol=1e-14, lsmr_tol=1e-14
        )
        rest = g + rows[used].T @ found.x
    scale = max(1.0, float(np.abs(g).max()))
    return max(case.violation(x), float(np.abs(rest).max()) / scale)


def ours(functions: Functions) -> tuple[np.ndarray, bool]:
    """The point, and whether success was claimed."""
    case = functions.case
    problem = tolerax.Objective(
        functions.value,
        bounds=(jnp.asarray(case.low), jnp.asarray(case.high)),
        constraints=functions.rows,
        constraint_bounds=(jnp.asarray(case.lower), jnp.asarray(case.upper)),
    )
    solver = tolerax.ExactAugmentedLagrangian()
    solution = tolerax.solve(problem, solver, jnp.asarray(case.x0), max_steps=MOST)
    functions.calls = 2 * int(solution.work.points)
    return np.asarray(solution.x), bool(solution.success)


def peer(functions: Functions, method: str) -> tuple[np.ndarray, bool]:
    """The same of a method of SciPy's."""
    case = functions.case
    options: dict[str, Any] = {"maxiter": MOST}
    more: dict[str, Any] = {}
    if method == "SLSQP":
        options["ftol"] = 1e-10
    else:
        # With a larger one it ends before its barrier has gone, far from solutions at bounds.
        options |= {"gtol": 1e-12, "xtol": 1e-12}
        more["hess"] = functions.hessian
    constraints = scipy.optimize.NonlinearConstraint(
        functions.constraints,
        case.lower,
        case.upper,
        jac=functions.jacobian,  # pyright: ignore[reportArgumentType]
        hess=functions.bent,
    )
    result = scipy.optimize.minimize(
        functions.fun,
        case.x0,
        jac=functions.gradient,
        method=method,
        bounds=scipy.optimize.Bounds(case.low, case.high),  # pyright: ignore[reportArgumentType]
        constraints=constraints,
        options=options,
        **more,
    )
    return result.x, bool(result.success)


def measure(settings: Settings) -> dict[str, Measured]:
    """Shares, evaluations and false claims; in a quick run every eighth problem."""
    names = ("ours",) if settings.quick else ("ours", "SLSQP", "trust-constr")
    rows: dict[str, Any] = {}
    for count, case in enumerate(cases(8 if settings.quick else 1)):
        # Compiled code of all problems would be more mappings of memory than a process may have.
        if count % 10 == 0:
            jax.clear_caches()
        row: dict[str, Any] = {}
        for name in names:
            functions = Functions(case)
            x, claimed = ours(functions) if name == "ours" else peer(functions, name)
            left = optimality(functions, x) if np.all(np.isfinite(x)) else np.inf
            row[name] = {
                "solved": bool(left <= TOLERANCE),
                "evaluations": functions.calls,
                "false": bool(claimed and not left <= 100 * TOLERANCE),
                "left": float(left),
                "value": float(functions.value(x)),
            }
        rows[case.name] = row
        settings.tell(f"   {case.name:8s} {row}")
    summary = {}
    for name in names:
        own = [row[name] for row in rows.values()]
        spent = [one["evaluations"] if one["solved"] else float("inf") for one in own]
        summary[name] = {
            "share": statistics.mean(one["solved"] for one in own),
            "evaluations": statistics.median(spent),
            "false": sum(one["false"] for one in own),
        }
    settings.tell(f"   {summary}")
    mine = summary["ours"]
    others = max((summary[name]["share"] for name in names[1:]), default=0.0)
    detail = {"summary": summary, "rows": rows}
    return {
        "cutest_ineq": Measured([mine["share"]], detail=detail),
        "cutest_ineq_lead": Measured([mine["share"] - others]),
        "cutest_ineq_false": Measured([float(mine["false"])]),
    }


GROUP = Group(
    "inequalities",
    (
        Bar("cutest_ineq", ">=", 0.95, "Hock and Schittkowski with inequalities: share solved"),
        Bar(
            "cutest_ineq_lead", ">=", 0, "that share less the larger one of SLSQP and trust-constr"
        ),
        Bar("cutest_ineq_false", "<=", 0, "successes that are none"),
    ),
    measure,
)
