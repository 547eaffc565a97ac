"""Equality-constrained CUTEst problems with n <= 100 beside SciPy's SLSQP and trust-constr.

The problems come from sif2jax, with exact derivatives for all. A problem is solved when, at the
returned point, the violation and the gradient of the Lagrangian with the best multipliers are at
most 1e-6 (largest entry), computed from outside. Evaluations are calls of the objective plus calls
of the constraints, the second look at the returned point included.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

import tolerax
from benchmarks import cutest_inequalities
from benchmarks.cutest_library import library
from benchmarks.frame import Bar, Group, Measured, Settings

TOLERANCE = 1e-6
NAMES = [
    "BYRDSPHR",
    "FLT",
    "HS6",
    "HS7",
    "HS8",
    "HS9",
    "HS26",
    "HS27",
    "HS28",
    "HS39",
    "HS40",
    "HS42",
    "HS46",
    "HS47",
    "HS48",
    "HS49",
    "HS50",
    "HS51",
    "HS52",
    "HS56",
    "HS61",
    "HS77",
    "HS78",
    "HS79",
    "HS111LNP",
    "HIMMELBC",
    "HIMMELBD",
    "HIMMELBE",
    "MARATOS",
    "MSS1",
    "ORTHREGB",
    "S316_322",
    "BT1",
    "BT2",
    "BT3",
    "BT4",
    "BT5",
    "BT6",
    "BT7",
    "BT8",
    "BT9",
    "BT10",
    "BT11",
    "BT12",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Objective and constraints on vectors, and the start."""

    name: str
    fun: Callable
    constraints: Callable
    x0: np.ndarray


def cases() -> list[Case]:
    """All problems of `NAMES`."""
    known = library()
    every = [*known.constrained_minimisation_problems, *known.constrained_quadratic_problems]
    known = {type(problem).__name__: problem for problem in every}
    return [_case(name, known[name]) for name in NAMES]


def _case(name: str, problem: Any) -> Case:
    x0, unravel = ravel_pytree(problem.y0)

    def fun(x: Any) -> Any:
        return jnp.asarray(problem.objective(unravel(x), problem.args), float).reshape(())

    def constraints(x: Any) -> Any:
        return ravel_pytree(problem.constraint(unravel(x))[0])[0]

    return Case(name, fun, constraints, np.asarray(x0, float))


def optimality(case: Case, x: np.ndarray) -> float:
    """The larger of violation and gradient of the Lagrangian with the best multipliers."""
    c, a = np.asarray(case.constraints(x)), np.asarray(jax.jacrev(case.constraints)(x))
    g = np.asarray(jax.grad(case.fun)(x))
    y = np.linalg.lstsq(a.T, -g, rcond=None)[0]
    return float(max(np.abs(c).max(), np.abs(g + a.T @ y).max()))


def ours(case: Case) -> tuple[np.ndarray, bool, int]:
    """The point, whether success was claimed, and evaluations."""
    problem = tolerax.Objective(
        case.fun, constraints=case.constraints, constraint_bounds=(0.0, 0.0)
    )
    solver = tolerax.ExactAugmentedLagrangian()
    solution = tolerax.solve(problem, solver, jnp.asarray(case.x0), max_steps=300)
    return np.asarray(solution.x), bool(solution.success), 2 * int(solution.work.points)


def peer(case: Case, method: str) -> tuple[np.ndarray, bool, int]:
    """The same of SciPy's methods, with exact derivatives."""
    calls = [0]

    def counted(fun: Callable) -> Callable:
        compiled = jax.jit(fun)

        def called(x: np.ndarray) -> np.ndarray:
            calls[0] += 1
            return np.asarray(compiled(x))

        return called

    jac, c_jac = jax.jit(jax.grad(case.fun)), jax.jit(jax.jacrev(case.constraints))
    options: dict[str, Any] = {"maxiter": 300}
    more: dict[str, Any] = {}
    if method == "SLSQP":
        options["ftol"] = 1e-10
        constraints: Any = {
            "type": "eq",
            "fun": counted(case.constraints),
            "jac": lambda x: np.asarray(c_jac(x)),
        }
    else:
        options |= {"gtol": 1e-7}
        hess, bent = jax.jit(jax.hessian(case.fun)), case.constraints
        c_hess = jax.jit(lambda x, v: jax.hessian(lambda x: v @ bent(x))(x))
        constraints = scipy.optimize.NonlinearConstraint(
            counted(case.constraints),
            0.0,
            0.0,
            jac=lambda x: np.asarray(c_jac(x)),  # pyright: ignore[reportArgumentType]
            hess=lambda x, v: np.asarray(c_hess(x, v)),
        )
        more["hess"] = lambda x: np.asarray(hess(x))
    result = scipy.optimize.minimize(
        counted(case.fun),
        case.x0,
        jac=lambda x: np.asarray(jac(x)),
        method=method,
        constraints=constraints,
        options=options,
        **more,
    )
    return result.x, bool(result.success), calls[0]


def measure(settings: Settings) -> dict[str, Measured]:
    """Shares, evaluations and false claims; in a quick run every fourth problem."""
    methods: dict[str, Callable] = {"ours": ours}
    if not settings.quick:
        methods |= {m: lambda case, m=m: peer(case, m) for m in ("SLSQP", "trust-constr")}
    rows: dict[str, Any] = {}
    for count, case in enumerate(cases()[:: 4 if settings.quick else 1]):
        # Compiled code of all problems would be more mappings of memory than a process may have.
        if count % 10 == 9:
            jax.clear_caches()
        row: dict[str, Any] = {}
        for name, method in methods.items():
            x, claimed, evaluations = method(case)
            solved = optimality(case, x) <= TOLERANCE
            # A claim holds up to the factor 2 of a second look.
            false = claimed and not optimality(case, x) <= 3 * TOLERANCE
            row[name] = {"solved": solved, "evaluations": evaluations, "false": false}
        rows[case.name] = row
        settings.tell(f"   {case.name:10s} {row}")
    solved = [row["ours"]["solved"] for row in rows.values()]
    spent = [
        row["ours"]["evaluations"] if row["ours"]["solved"] else float("inf")
        for row in rows.values()
    ]
    peers = {
        name: {
            "share": statistics.mean(row[name]["solved"] for row in rows.values()),
            "evaluations": statistics.median(
                row[name]["evaluations"] if row[name]["solved"] else float("inf")
                for row in rows.values()
            ),
            "false": sum(row[name]["false"] for row in rows.values()),
        }
        for name in methods
    }
    settings.tell(f"   {peers}")
    return {
        "cutest_eq": Measured([float(one) for one in solved], statistics.mean(solved), peers),
        "cutest_evals": Measured(spent, detail={"rows": rows}),
        "cutest_false": Measured([float(peers["ours"]["false"])]),
    }


GROUPS = (
    Group(
        "cutest",
        (
            Bar("cutest_eq", ">=", 0.97, "equality-constrained CUTEst, n <= 100: share solved"),
            Bar("cutest_evals", "<=", 16, "median evaluations of objective and constraints"),
            Bar("cutest_false", "<=", 0, "successes that are none"),
        ),
        measure,
    ),
    cutest_inequalities.GROUP,
)
