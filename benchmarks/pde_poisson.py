"""P1, Poisson control: error to the exact optimum, iterations over grids, time beside SciPy."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.problems.library import PDEExample, poisson_control

ALPHAS = (1e-2, 1e-4, 1e-6)
# SciPy's conjugate gradients end here; our Newton equation is solved as far.
REDUCTION = 1e-10


@eqx.filter_jit
def run(problem: Any, x0: jax.Array, rtol: jax.Array) -> tolerax.Solution:
    """One Newton step to `rtol`, compiled as a whole."""
    solver = tolerax.InexactNewton(rtol=rtol, atol=0.0, forcing=1e-13)
    return tolerax.solve(problem, solver, x0, max_steps=20)


def solved(n: int, alpha: float, rtol: float) -> tuple[PDEExample, tolerax.Solution]:
    """P1 and its solution."""
    p = poisson_control(n, alpha)
    return p, run(p.problem, p.x0, jnp.asarray(rtol))


def measure(settings: Settings) -> dict[str, Measured]:
    """Errors relative to the largest control, and products with the Hessian."""
    sizes = (16, 32, 64) if settings.quick else (16, 32, 64, 128, 256)
    errors, spreads, rows = [], [], {}
    for alpha in ALPHAS:
        counts = []
        for n in sizes:
            # The control is the gradient over alpha: what is asked has to be that much smaller.
            p, solution = solved(n, alpha, 1e-9 * alpha)
            size = jnp.max(jnp.abs(p.optimum))
            error = float(jnp.max(jnp.abs(solution.x - p.optimum)) / size)
            errors.append(error)
            _, loose = solved(n, alpha, REDUCTION)
            counts.append(int(loose.state.solver_state.model.products))
            rows[f"{alpha:g} {n}"] = {"error": error, "products": counts[-1]}
            settings.tell(f"   alpha {alpha:g} n {n}: error {error:.1e}, {counts[-1]} products")
        spreads.append(max(counts) / min(counts))
    return {
        "p1_error": Measured(errors, max(errors), {"rows": rows}),
        "p1_krylov_spread": Measured(spreads, max(spreads)),
    }


def scipy_run(p: PDEExample, alpha: float) -> np.ndarray:
    """Factor the Laplacian, then conjugate gradients on the reduced Hessian."""
    import scipy.sparse as sparse
    import scipy.sparse.linalg as linalg

    n = p.laplacian.shape[0]
    h = 1 / (n + 1)
    line = sparse.diags([-1, 2, -1], [-1, 0, 1], shape=(n, n)) / h**2  # pyright: ignore
    A = sparse.kronsum(line, line).tocsc()
    options = {"SymmetricMode": True}
    factor = linalg.splu(A, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    target = np.asarray(p.cost.target).ravel()  # pyright: ignore
    product = lambda u: alpha * u + factor.solve(factor.solve(u))  # noqa: E731
    reduced = linalg.LinearOperator(A.shape, product)
    u, info = linalg.cg(reduced, factor.solve(target), rtol=REDUCTION, atol=0.0)
    assert info == 0
    return u.reshape(n, n)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def measure_time(settings: Settings) -> dict[str, Measured]:
    """Warm runs of both, by turns; the smaller of the times of each."""
    sizes, alpha = (64,) if settings.quick else (64, 128, 256), 1e-4
    ratios, rows = [], {}
    for n in sizes:
        p, solution = solved(n, alpha, REDUCTION)
        ours = functools.partial(run, p.problem, p.x0, jnp.asarray(REDUCTION))
        ours_s, scipy_s, peer = [], [], np.zeros(0)
        for _ in range(7):
            ours_s.append(timed(ours))
            began = time.perf_counter()
            peer = scipy_run(p, alpha)
            scipy_s.append(time.perf_counter() - began)
        ratios.append(min(ours_s) / min(scipy_s))
        size = float(jnp.max(jnp.abs(p.optimum)))
        rows[n] = {
            "ours_ms": 1e3 * min(ours_s),
            "scipy_ms": 1e3 * min(scipy_s),
            "median_ratio": statistics.median(ours_s) / statistics.median(scipy_s),
            "our_error": float(jnp.max(jnp.abs(solution.x - p.optimum))) / size,
            "scipy_error": float(np.max(np.abs(peer - np.asarray(p.optimum)))) / size,
            "our_work": solution.work.as_dict(),
        }
        settings.tell(f"   n {n}: {rows[n]}")
    return {"p1_time_vs_scipy": Measured(ratios, max(ratios), {"rows": rows})}


GROUP = Group(
    "p1",
    (
        Bar("p1_error", "<=", 1e-8, "Poisson control: largest relative error of the control"),
        Bar("p1_krylov_spread", "<=", 1.2, "most / fewest Hessian products over the grids"),
    ),
    measure,
)
TIME_GROUP = Group(
    "p1_time",
    (Bar("p1_time_vs_scipy", "<=", 0.25, "warm time / SciPy: factor and conjugate gradients"),),
    measure_time,
)
