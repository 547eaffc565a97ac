"""`minimize`: the solvers behind SciPy's interface, and `scipy_method` for SciPy's own `minimize`.

One adapter serves both. It computes in float64 whatever the global flag of JAX says, takes and
returns NumPy, and refuses what a method cannot honour instead of ignoring it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree

from tolerax._scipy import (
    all_fixed,
    as_float64,
    bound_vectors,
    function_problem,
    given_problem,
    in_float64,
    inside,
    is_empty,
    listed_as_vector,
    start_vector,
)
from tolerax.contracts import Accuracy, Evaluation, Problem, Query, Solver, Start, State, Work
from tolerax.driver import solve
from tolerax.restarts import solve_with_restarts
from tolerax.solution import Solution, Step
from tolerax.solvers.attack import DirectionalAttack
from tolerax.solvers.augmented_lagrangian import ExactAugmentedLagrangian
from tolerax.solvers.cbo import CBO
from tolerax.solvers.cdsm import CDSM
from tolerax.solvers.freezing import ConsensusFreezing
from tolerax.solvers.hoag import HOAG
from tolerax.solvers.hopping import ConsensusHopping
from tolerax.solvers.line_search import InexactLineSearch
from tolerax.solvers.maid import MAID
from tolerax.solvers.model_trust_region import ModelTrustRegion
from tolerax.solvers.newton import InexactNewton
from tolerax.status import Status
from tolerax.validation import check_integer

#: What `method=` may be: a solver is made by calling the entry. New solvers are added here.
METHODS: dict[str, Callable[[], Solver]] = {
    "line-search": InexactLineSearch,
    "steepest-descent": functools.partial(InexactLineSearch, memory=0),
    "newton": InexactNewton,
    "maid": MAID,
    "hoag": HOAG,
    "sqp": ExactAugmentedLagrangian,
    "cbo": CBO,
    "consensus-hopping": ConsensusHopping,
    "consensus-freezing": ConsensusFreezing,
    "model-trust-region": ModelTrustRegion,
    "cdsm": CDSM,
    "attack": DirectionalAttack,
}

#: Codes of `OptimizeResult.status`: 0 is success; 1, 2, 3 and 99 are those of SciPy's BFGS.
CODES: dict[str, int] = {
    "converged": 0,
    "converged_estimated": 0,
    "consensus": 0,
    "sampled": 0,
    "budget": 1,
    "stalled": 2,
    "non_finite_start": 3,
    "accuracy_floor": 4,
    "time": 5,
    "all_failed": 6,
    "gradient_inconsistent": 7,
    "not_reproduced": 8,
    "unbounded": 9,
    "infeasible": 10,
    "inner_failed": 11,
    "contradicted": 12,
    "worker_lost": 13,
    "stopped": 99,
}

RUN_OPTIONS = (
    "checkpoint",
    "disp",
    "executor",
    "key",
    "max_seconds",
    "max_steps",
    "max_work",
    "maxfev",
    "maxfun",
    "maxiter",
    "on_error",
    "progress",
    "restarts",
)


def minimize(
    fun: Callable | Problem,
    x0: PyTree,
    args: Any = (),
    method: str | Solver | None = None,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: float | None = None,
    callback: Callable | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Minimize a function as with `scipy.optimize.minimize`: same arguments, same kind of result.

    **Arguments:**

    - `fun`: `fun(x, *args) -> float` with x of shape `(n,)`; or one of the problems of this
      library, then x0 may be any pytree of float arrays (a list of numbers is a vector). A function
      that JAX can trace is compiled and differentiated; for that it is called with abstract values.
      Any other function is called as Python code with NumPy arrays and needs `jac`. Compiling takes
      a second or two for each new function object: define it once, and pass what changes in `args`.
    - `x0`: the start. Integers are cast; a point outside `bounds` is moved inside, with a warning.
    - `args`: further arguments of `fun` and `jac`; a single one may stand without its tuple.
    - `method`: `"line-search"` (default without constraints), `"steepest-descent"`, `"newton"`,
      `"maid"`, `"hoag"`; `"sqp"` (default with constraints; uses second derivatives); `"cbo"`,
      `"consensus-hopping"`, `"consensus-freezing"` (by values at many points);
      `"model-trust-region"`, `"cdsm"` (by values at few points), `"attack"` (by some gradients and
      values, for functions of networks); or a solver of this library.
    - `jac`: `None`; `True` when `fun` returns `(value, gradient)`; a callable `jac(x, *args)`;
      `"2-point"` (forward differences, central ones where the accuracy needs them) or `"3-point"`
      (central differences). With a string `fun` is always called as Python code.
    - `bounds`: a `scipy.optimize.Bounds` or one pair `(low, high)` a variable, `None` for no bound.
      Neither iterates nor finite differences leave them.
    - `constraints`: dicts, `scipy.optimize.NonlinearConstraint` or `LinearConstraint`, one or a
      list. A function that JAX can trace is differentiated by JAX, whatever its `jac`; others by
      their `jac`, a callable that returns the matrix, or `"2-point"` (default) or `"3-point"`.
      A `hess` of theirs is not used, with a warning; their `finite_diff_rel_step` is refused.
    - `hess(x, *args)`: the Hessian matrix; `hessp(x, v, *args)`: its product with v; for methods
      that use second derivatives (`"newton"`), which JAX finds where they are not given, and
      differences of `jac` where JAX cannot.
    - `hess`, `hessp`, `constraints`: refused by methods that cannot use them.
    - `tol`: the tolerance of the solver: the line searches stop when the Euclidean norm of the
      projected gradient plus its error bound is at most `tol`. Explicit options win.
    - `callback`: `callback(intermediate_result)`, called by keyword when its only parameter has
      that name, else `callback(x)`, after each iteration, with the best point so far. Only
      `StopIteration` stops: `status` is then 99 and `success` false.
    - `options`: fields of the solver (`memory`, `rtol`, `atol`, ...); `maxiter` (iterations),
      `maxfun` or `maxfev` (calls of `fun`, those for differences included, checked between
      answers); `restarts` (further runs of a population method, each twice as large, see
      [`solve_with_restarts`][]; `maxiter` then counts in each run); `max_steps`, `max_work`,
      `max_seconds`, `progress`, `checkpoint`, `executor` and `key` as in `solve`; `on_error` as in
      `Objective`; `disp=True` shows a progress bar.

    **Returns:** a `scipy.optimize.OptimizeResult` with `x`, `success`, `status` (0 for success),
    `message`, `fun`, `jac`, `nfev`, `njev`, `nhev` (Hessian products), `nit`, `maxcv` (the
    largest violation of a constraint, for methods that take constraints), and of our own
    `status_name` (the name in `Status`), `value_error` and `gradient_error` (bounds on the errors
    of `fun` and `jac`), `work` (counts by kind) and `solution` (what `solve` returns). Runs that do
    not converge are reported, not raised. An exception of `fun` becomes an `EvaluationError` that
    carries the best point so far as `solution`.

    >>> import tolerax
    >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    >>> result = tolerax.minimize(rosenbrock, [-1.2, 1.0], bounds=[(None, 0.5), (None, None)])
    >>> result.x.round(6), result.success
    (array([0.5 , 0.25]), True)
    """
    if method is None:
        bound = constraints if not isinstance(fun, Problem) else fun.constraint_bounds
        method = "line-search" if is_empty(bound) else "sqp"
    solver = _solver(method)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options is {options!r}: give a dict.")
    options = dict(options or {})
    if tol is not None:
        options.setdefault("tol", tol)
    return _minimize(
        solver, fun, x0, args, jac, hess, hessp, bounds, constraints, callback, options, False
    )


def scipy_method(solver: Solver) -> Callable:
    """A solver as the callable that `scipy.optimize.minimize(method=...)` expects.

    SciPy passes finite-difference strings on as `None`: for Python code `jac=None` therefore means
    `"2-point"` here. Options, result and callback are those of `minimize`.

    >>> import numpy as np, scipy.optimize, tolerax
    >>> method = tolerax.scipy_method(tolerax.InexactLineSearch())
    >>> scipy.optimize.minimize(scipy.optimize.rosen, np.zeros(2), method=method).x.round(5)
    array([1., 1.])
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {solver!r}, not a Solver: try `tolerax.InexactLineSearch()`.")

    def method(
        fun: Any,
        x0: Any,
        args: Any = (),
        jac: Any = None,
        hess: Any = None,
        hessp: Any = None,
        bounds: Any = None,
        constraints: Any = (),
        callback: Callable | None = None,
        **options: Any,
    ) -> Any:
        return _minimize(
            solver, fun, x0, args, jac, hess, hessp, bounds, constraints, callback, options, True
        )

    return method


def _solver(method: Any) -> Solver:
    if isinstance(method, Solver):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method is {method!r}: give a name or a solver.")
    make = METHODS.get(method.lower().replace("_", "-"))
    if make is None:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}.")
    return make()


def _minimize(
    solver: Solver,
    fun: Any,
    x0: Any,
    args: Any,
    jac: Any,
    hess: Any,
    hessp: Any,
    bounds: Any,
    constraints: Any,
    callback: Callable | None,
    options: dict[str, Any],
    may_difference: bool,
) -> Any:
    """The one adapter behind `minimize` and `scipy_method`."""
    if not solver.uses_hessian:
        _refuse(solver, hess=hess, hessp=hessp)
    if not solver.honours_constraints:
        _refuse(solver, constraints=constraints)
    solver, options = _configure(solver, options)
    args = args if isinstance(args, tuple) else (args,)
    with jax.enable_x64(True):
        on_error = options.pop("on_error", None)
        if isinstance(fun, Problem):
            x = jax.tree.map(functools.partial(as_float64, name="x0"), listed_as_vector(x0))
            given = {"args": args, "jac": jac, "hess": hess, "hessp": hessp}
            given |= {"on_error": on_error, "constraints": constraints}
            problem, reason = given_problem(fun, x, bounds, given), None
        else:
            x = start_vector(x0)
            limits = bound_vectors(bounds, x.size)
            problem, reason = function_problem(
                fun, x, args, jac, (hess, hessp), limits, constraints, on_error, may_difference
            )
        problem, solver = in_float64(problem), in_float64(solver)
        x = inside(x, problem.bounds)
        if all_fixed(x, problem.bounds):
            return _only_point(problem, solver, x)
        try:
            solution = _run(problem, solver, x, callback, options)
        except TypeError as error:
            if reason is not None and getattr(problem, "gradient", None) is None:
                error.add_note(f"JAX could not trace fun: {type(reason).__name__}: {reason}")
            raise
        return _result(solution, solver)


def _run(
    problem: Problem,
    solver: Solver,
    x: PyTree,
    callback: Callable | None,
    options: dict[str, Any],
) -> Solution:
    """`solve` with SciPy's limits: `maxiter` counts iterations, `maxfun` values."""
    iterations = options.pop("maxiter", None)
    steps = options.pop("max_steps", None)
    enough = [1000]
    bounded = solver
    if iterations is not None:
        enough.append(50 * check_integer("maxiter", iterations))
        bounded = AtMost(solver, jnp.asarray(iterations))
    for name in ("maxfun", "maxfev"):
        calls = options.pop(name, None)
        if calls is not None:
            enough.append(check_integer(name, calls))
            work = options.get("max_work")
            if isinstance(work, int):
                work = {"units": work}
            options["max_work"] = dict(work or {}) | {"values": int(calls)}
    if callback is not None:
        options["callback"] = _Callback(callback, bounded)
    steps = max(enough) if steps is None else steps
    restarts = options.pop("restarts", 0)
    if restarts:
        if solver.larger(2) is solver:
            raise ValueError(
                f"restarts is {restarts!r}, but {type(solver).__name__} has no population that a "
                'restart could enlarge: leave it out, or use a population method such as "cbo".'
            )
        options["restarts"] = restarts
    run = solve_with_restarts if restarts else solve
    solution = run(problem, bounded, x, max_steps=steps, **options)
    if bounded is not solver:
        # The caller continues with the plain solver.
        own = lambda s: s.state.solver_state  # noqa: E731
        solution = eqx.tree_at(own, solution, own(solution)[0])
    return solution


class AtMost(Solver):
    """A solver that ends with `Status.budget` after a number of iterations, which it records as
    `iteration`; answers are counted for one that records none. The state is `(state, answers)`."""

    solver: Solver
    limit: Array

    def check(self, x0: PyTree) -> None:
        self.solver.check(x0)

    def init(self, start: Start) -> State:
        return self.solver.init(start), jnp.array(0)

    def ask(self, state: State) -> Query:
        return self.solver.ask(state[0])

    def tell(self, state: State, query: Query, evaluation: Evaluation) -> State:
        return self.solver.tell(state[0], query, evaluation), state[1] + 1

    def terminate(self, state: State) -> tuple[Bool[Array, ""], Any]:
        done, status = self.solver.terminate(state[0])
        iteration = jnp.asarray(self.record(state).get("iteration", state[1]))
        spent = iteration >= self.limit
        return done | spent, Status.where(done, status, Status.budget)

    def verify(self, state: State, evaluation: Evaluation) -> Bool[Array, ""]:
        return self.solver.verify(state[0], evaluation)

    def work(self, state: State) -> Work:
        return self.solver.work(state[0])

    def record(self, state: State) -> dict[str, Array]:
        return self.solver.record(state[0])

    def by_gradients(self) -> Solver:
        return AtMost(self.solver.by_gradients(), self.limit)

    def larger(self, factor: int) -> Solver:
        larger = self.solver.larger(factor)
        return self if larger is self.solver else AtMost(larger, self.limit)

    @property
    def feasibility(self) -> ArrayLike:
        return self.solver.feasibility

    @property
    def honours_constraints(self) -> bool:
        return self.solver.honours_constraints

    @property
    def uses_hessian(self) -> bool:
        return self.solver.uses_hessian

    @property
    def honours_bounds(self) -> bool:
        return self.solver.honours_bounds


class _Callback:
    """Calls a SciPy-style callback after each iteration."""

    def __init__(self, user: Callable, solver: Solver):
        if not callable(user):
            raise TypeError(f"callback is {user!r}: give a callable.")
        self.user, self.solver = user, solver
        self.seen = 0
        try:
            names = set(inspect.signature(user).parameters)
        except (TypeError, ValueError):
            names = set()
        self.by_keyword = names == {"intermediate_result"}

    def __call__(self, step: Step) -> None:
        recorded = self.solver.record(step.run.solver_state)
        iteration = int(recorded.get("iteration", step.run.step))
        if iteration == self.seen:
            return
        self.seen = iteration
        x = jax.tree.map(np.array, step.x)
        if not self.by_keyword:
            self.user(x)
            return
        from scipy.optimize import OptimizeResult

        self.user(intermediate_result=OptimizeResult(x=x, fun=step.value, nit=iteration))


def _refuse(solver: Solver, **given: Any) -> None:
    for name, value in given.items():
        if not is_empty(value):
            raise ValueError(
                f"{name} is given, but {type(solver).__name__} cannot use it: leave {name} out or "
                "choose a method that does."
            )


def _configure(solver: Solver, options: dict[str, Any]) -> tuple[Solver, dict[str, Any]]:
    """The solver with its fields set from the options, and the options of the run."""
    fields = {field.name for field in dataclasses.fields(solver) if field.init}
    known = fields | set(RUN_OPTIONS) | {"tol"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]!r} for {type(solver).__name__}: use one of "
            f"{', '.join(sorted(known))}."
        )
    tol = options.get("tol")
    changes = {}
    if tol is not None:
        # The tolerance means the same whatever the gradient at x0.
        by_tol = {"tol": tol, "atol": tol, "rtol": 0.0}
        changes = {name: value for name, value in by_tol.items() if name in fields}
        if not changes:
            raise ValueError(f"tol is {tol!r}, but {type(solver).__name__} has no tolerance.")
    changes |= {name: value for name, value in options.items() if name in fields}
    run = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    if run.pop("disp", False) and "progress" not in run:
        run["progress"] = True
    return dataclasses.replace(solver, **changes) if changes else solver, run


# -- the result -----------------------------------------------------------------------------------


def _only_point(problem: Problem, solver: Solver, x: PyTree) -> Any:
    """The result when the bounds leave no choice."""
    from scipy.optimize import OptimizeResult

    query = Query(x, Accuracy(1e-3, 1e-3), problem.cold_start(), derivatives=0)
    evaluation = problem.evaluate(query)
    value = float(evaluation.value)
    name, more = "converged", ""
    if not np.isfinite(value):
        name, more = "non_finite_start", " The value there is not finite."
    elif evaluation.violation is not None and not evaluation.violation <= solver.feasibility:
        name, more = "infeasible", f" Constraints are violated by {float(evaluation.violation)}."
    return OptimizeResult(
        x=jax.tree.map(np.array, x),
        success=name == "converged",
        status=CODES[name],
        status_name=name,
        message="All variables are fixed by the bounds." + more,
        fun=value,
        value_error=float(evaluation.value_error),
        nfev=int(evaluation.work.values),
        njev=0,
        nhev=0,
        nit=0,
        work=evaluation.work.as_dict(),
    )


def _result(solution: Solution, solver: Solver) -> Any:
    from scipy.optimize import OptimizeResult

    recorded = solver.record(solution.state.solver_state)
    name = next(name for name in CODES if bool(solution.status == getattr(Status, name)))
    result = OptimizeResult(
        x=jax.tree.map(np.array, solution.x),
        success=bool(solution.success),
        status=CODES[name],
        status_name=name,
        message=solution.message,
        fun=float(solution.value),
        value_error=float(solution.value_error),
        nfev=int(solution.work.values),
        njev=int(solution.work.gradients),
        nhev=int(solution.work.hessian_products),
        nit=int(recorded.get("iteration", solution.steps)),
        work=solution.work.as_dict(),
        solution=solution,
    )
    if solution.gradient is not None:
        result.jac = jax.tree.map(np.array, solution.gradient)
        result.gradient_error = float(solution.gradient_error)
    if solver.honours_constraints:
        result.maxcv = float(solution.violation)
        if name == "infeasible":
            result.message += f" The least violation seen is {result.maxcv:.3g}."
    return result
