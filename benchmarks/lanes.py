"""Many small least-squares problems at once, beside optimistix and jaxopt under `vmap`.

Each of 64 experts has 256 residuals `R(u) u_t - D u_xx + s(u) - f` of Freundlich's type at random
points, with the solution u in the span of 16 waves, and a small ridge. Every solver starts from the
same coefficients and gets the same residuals; the loss is a sum over the minimizers, and its
gradient in the data f comes by implicit differentiation.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax.inner import GaussNewtonCG, Pointwise

LANES, M, N = 64, 256, 16
# Ours is on the error, theirs on the last step: with these all that are right leave an error below
# ours, and a gradient that is right to three digits.
RIDGE, TOLERANCE, PEER_TOLERANCE = 1e-8, 1e-8, 1e-6


def equation(z: Any, f: Any) -> Any:
    """The residuals of one expert, from u, u_t, u_xx at its points."""
    u, u_t, u_xx = z
    positive = 0.5 * (u + jnp.sqrt(u * u + 1e-3)) + 1e-6
    return u_t * (1 + 2.15691 * positive**-0.126) - 0.05 * u_xx + 2 * (u + 0.3 * u**3) - f


def experts(seed: int, noise: float) -> tuple[Any, Any, Any]:
    """Channels, right-hand sides (with noise that the basis cannot explain), starts."""
    keys = jax.random.split(jax.random.key(seed), 7)
    x, t = jax.random.uniform(keys[0], (2, LANES, M, 1))
    k, l = 2.5 * jax.random.normal(keys[1], (2, LANES, 1, N)).at[..., 0].set(0)  # noqa: E741
    phase = jax.random.uniform(keys[2], (LANES, 1, N), maxval=2 * np.pi).at[..., 0].set(0)
    size = jnp.exp(-0.35 * jnp.arange(N))[None, None]
    angle = k * x + l * t + phase
    wave, slope = size * jnp.cos(angle), -size * jnp.sin(angle)
    Phi = jnp.stack([wave, l * slope, -k * k * wave], axis=1)
    w = (0.2 * jax.random.normal(keys[3], (LANES, N))).at[:, 0].set(0.6)
    z = jnp.moveaxis(jnp.einsum("kcmn,kn->kcm", Phi, w), 1, 0)
    f = equation(z, 0.0) + noise * jax.random.normal(keys[4], (LANES, M))
    return Phi, f, w + 0.02 * jax.random.normal(keys[5], w.shape)


def plain(w: Any, data: Any) -> Any:
    """The residuals with those of the ridge, for solvers that know neither structure nor ridge."""
    Phi, f = data
    z = jnp.einsum("cmn,n->cm", Phi, w)
    return jnp.concatenate([equation(z, f), jnp.sqrt(RIDGE) * w])


Solve = Callable[[Any, Any, Any], Any]


def ours(Phi: Any, f: Any, start: Any) -> Any:
    """This library with its defaults."""
    return tolerax.batched_least_squares(
        Pointwise(equation), start, (Phi, f), tolerance=TOLERANCE, ridge=RIDGE
    ).w


def by_optimistix(solver: Any, adjoint: Any = None) -> Solve:
    """One of its solvers under `vmap`; the default adjoint, or another linear solver for it."""
    import optimistix

    implicit = optimistix.ImplicitAdjoint(*([] if adjoint is None else [adjoint]))

    def one(Phi: Any, f: Any, start: Any) -> Any:
        return optimistix.least_squares(
            plain, solver, start, (Phi, f), adjoint=implicit, max_steps=200, throw=False
        ).value

    return jax.vmap(one)


def by_jaxopt(Phi: Any, f: Any, start: Any) -> Any:
    """jaxopt's Levenberg-Marquardt with Cholesky's method under `vmap`."""
    import jaxopt

    solver = jaxopt.LevenbergMarquardt(plain, tol=PEER_TOLERANCE, maxiter=200, solver="cholesky")
    return jax.vmap(lambda Phi, f, w: solver.run(w, (Phi, f)).params)(Phi, f, start)


def peers() -> dict[str, Solve]:
    """Every solver that is compared, by name."""
    import lineax
    import optimistix

    normal = lineax.Normal(lineax.Cholesky())
    lm, gn, dogleg = optimistix.LevenbergMarquardt, optimistix.GaussNewton, optimistix.Dogleg
    tol = PEER_TOLERANCE
    return {
        "optimistix LM, QR": by_optimistix(lm(tol, tol)),
        "optimistix LM, Cholesky": by_optimistix(lm(tol, tol, linear_solver=normal)),
        "optimistix GN, QR": by_optimistix(gn(tol, tol)),
        "optimistix GN, Cholesky": by_optimistix(gn(tol, tol, linear_solver=normal), lineax.LU()),
        "optimistix Dogleg": by_optimistix(dogleg(tol, tol)),
        "jaxopt LM, Cholesky": by_jaxopt,
    }


@jax.jit
def stationarity(w: Any, Phi: Any, f: Any) -> Any:
    """The length of the Gauss-Newton step in the energy norm, lane by lane."""

    def one(w: Any, Phi: Any, f: Any) -> Any:
        r = plain(w, (Phi, f))
        J = jax.jacfwd(lambda w: plain(w, (Phi, f)))(w)
        return jnp.linalg.norm(J @ jnp.linalg.lstsq(J, r)[0])

    return jax.vmap(one)(w, Phi, f)


@dataclass(frozen=True)
class Timed:
    """Least seconds of a forward and backward pass, and what came out."""

    seconds: float
    w: Any
    gradient: Any


def timed(solvers: dict[str, Solve], data: tuple, repeats: int) -> dict[str, Timed]:
    """Forward and backward, in turns, after a call that compiles."""
    Phi, f, start = data
    weights = jnp.cos(jnp.arange(LANES * N, dtype=f.dtype)).reshape(LANES, N)

    def compiled(solve: Solve) -> Callable[[], Any]:
        def loss(f: Any, Phi: Any, start: Any) -> Any:
            w = solve(Phi, f, start)
            return jnp.sum(weights * w), w

        both = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda: jax.block_until_ready(both(f, Phi, start))

    runs = {name: compiled(solve) for name, solve in solvers.items()}
    answers = {name: run() for name, run in runs.items()}
    seconds = dict.fromkeys(runs, np.inf)
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return {name: Timed(seconds[name], w, gradient) for name, ((_, w), gradient) in answers.items()}


def measure_speed(settings: Settings) -> dict[str, Measured]:
    """Ratios of the time of ours to that of the best peer that is right, and of the default LM.

    Right: the Gauss-Newton step that is left is at most 1e-6 in every lane, and the gradient agrees
    to 1e-3 with that of a solve to twelve digits.
    """
    best, lm, rows = [], [], {}
    for seed in settings.seeds:
        data = experts(seed, 0.0)
        found = timed({"ours": ours, **peers()}, data, 5 if settings.quick else 15)
        reference = timed({"tight": tight}, data, 0)["tight"].gradient
        table = {}
        for name, run in found.items():
            left = float(jnp.max(stationarity(run.w, *data[:2])))
            wrong = float(jnp.linalg.norm(run.gradient - reference) / jnp.linalg.norm(reference))
            right = left <= 1e-6 and wrong <= 1e-3
            table[name] = {"ms": 1e3 * run.seconds, "left": left, "wrong": wrong, "right": right}
            settings.tell(f"   seed {seed} {name:24s} {table[name]}")
        rows[seed] = table
        others = [row["ms"] for name, row in table.items() if name[:3] == "opt" and row["right"]]
        mine = table["ours"]["ms"] if table["ours"]["right"] else float("inf")
        best.append(mine / min(others, default=float("nan")))
        lm.append(mine / table["optimistix LM, QR"]["ms"])
    detail = {"rows": rows}
    return {
        "lsq_vs_best": Measured(best, detail=detail),
        "lsq_vs_lm": Measured(lm, detail=detail),
    }


def tight(Phi: Any, f: Any, start: Any) -> Any:
    """Ours to twelve digits: the reference."""
    return tolerax.batched_least_squares(
        Pointwise(equation), start, (Phi, f), tolerance=1e-12, ridge=RIDGE
    ).w


def measure_noise(settings: Settings) -> dict[str, Measured]:
    """The share of lanes that converge to 1e-6 on data with a noise of 0.1, from good starts and
    from a constant. With a noise of 1 (in the details) solutions touch zero, where R is steep."""
    shares, rows, tolerance = [], {}, 1e-6
    solver = tolerax.BatchedLevenbergMarquardt(max_steps=400)
    run = jax.jit(
        lambda Phi, f, w: solver(Pointwise(equation), w, (Phi, f), tolerance=tolerance, ridge=RIDGE)
    )
    for seed in settings.seeds:
        for noise in (0.1, 1.0):
            Phi, f, start = experts(seed, noise)
            flat = jnp.zeros_like(start).at[:, 0].set(0.5)
            for name, w in (("near", start), ("flat", flat)):
                result = run(Phi, f, w)
                fine = (result.error <= tolerance) & jnp.all(jnp.isfinite(result.w), axis=1)
                share = float(jnp.mean(fine))
                if noise < 1:
                    shares.append(share)
                key = f"seed {seed}, noise {noise:g}, {name}"
                rows[key] = {
                    "share": share,
                    "mean": float(jnp.mean(result.evaluations)),
                    "most": int(jnp.max(result.evaluations)),
                }
                settings.tell(f"   {key} {rows[key]}")
    return {"lsq_noise": Measured(shares, value=min(shares), detail={"rows": rows})}


def conditioned(seed: int, condition: float) -> tuple[Any, Any, Any]:
    """Residuals `A (w + w^3 / 10) - b` with A of known factors: matrices, right-hand sides beside
    the range of A, and the exact derivative of the sum of the minimizers in b."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    V = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    s = np.geomspace(1, 1 / condition, 8)
    w = rng.uniform(0.5, 1.5, 8)
    A = U[:, :8] * s @ V.T
    b = A @ (w + 0.1 * w**3) + 1e-3 * U[:, 8]
    derivative = (U[:, :8] / s) @ V.T @ (1 / (1 + 0.3 * w**2))
    return jnp.asarray(A), jnp.asarray(b), jnp.asarray(derivative)


def measure_gradient(settings: Settings) -> dict[str, Measured]:
    """The largest relative error of a gradient whose exact value is known, and that of jaxopt."""
    import jaxopt

    def residuals(w: Any, data: Any) -> Any:
        return data[0] @ (w + 0.1 * w**3) - data[1]

    start = jnp.ones(8)

    def mine(b: Any, A: Any) -> Any:
        found = tolerax.batched_least_squares(
            residuals, start[None], (A[None], b[None]), tolerance=1e-12
        )
        return jnp.sum(found.w)

    def other(b: Any, A: Any) -> Any:
        solver = jaxopt.LevenbergMarquardt(residuals, tol=1e-12, maxiter=200, solver="cholesky")
        return jnp.sum(solver.run(start, (A, b)).params)

    errors: dict[str, dict[str, float]] = {}
    samples = []
    for name, loss in (("ours", mine), ("jaxopt", other)):
        slope = jax.jit(jax.grad(loss))
        errors[name] = {}
        for condition in (1e1, 1e2, 1e3, 1e4, 1e5):
            worst = 0.0
            for seed in settings.seeds:
                A, b, true = conditioned(seed, condition)
                wrong = jnp.linalg.norm(slope(b, A) - true) / jnp.linalg.norm(true)
                worst = max(worst, float(wrong))
            errors[name][f"{condition:.0e}"] = worst
            if name == "ours":
                samples.append(worst)
        settings.tell(f"   {name}: {errors[name]}")
    return {"grad_error": Measured(samples, value=max(samples), detail=errors)}


CUBIC = Pointwise(lambda z, f: z[1] + z[0] + 0.1 * z[0] ** 3 - f)


def sized(seed: int, n: int, condition: float) -> tuple[Any, Any]:
    """One lane of n unknowns and 2 n residuals of two channels, random matrices times one of known
    singular values: channels and right-hand sides, with noise."""
    rng = np.random.default_rng(seed)
    values = np.geomspace(1, 1 / condition, n)
    V = np.linalg.qr(rng.normal(size=(n, n)))[0]
    Phi = rng.normal(size=(1, 2, 2 * n, n)) / np.sqrt(2 * n) * values @ V.T
    z = np.einsum("kcmn,n->ckm", Phi, rng.normal(size=n))
    f = np.asarray(CUBIC.fun(z, 0.0)) + 0.01 * rng.normal(size=(1, 2 * n))
    return jnp.asarray(Phi), jnp.asarray(f)


def measure_size(settings: Settings) -> dict[str, Measured]:
    """CPU time of products with J over that of factoring J'J, forward, warm, by the number of
    unknowns and for two conditions; the figure is that of 512 well-conditioned ones."""

    def compiled(solver: Any) -> Callable[[Any, Any], Any]:
        options = {"tolerance": TOLERANCE, "ridge": RIDGE}
        return jax.jit(lambda w, data: solver(CUBIC, w, data, **options))

    samples, rows = [], {}
    for n in (64, 128, 256, 512) if settings.quick else (64, 128, 256, 512, 1024):
        factored, products = (
            compiled(tolerax.BatchedLevenbergMarquardt()),
            compiled(GaussNewtonCG()),
        )
        start = jnp.zeros((1, n))
        for seed, condition in itertools.product(settings.seeds, (1.0, 1e2)):
            data, row = sized(seed, n, condition), {}
            for name, run in (("factored", factored), ("products", products)):
                found, spent = run(start, data), []
                for _ in range(3):
                    began = time.process_time()
                    jax.block_until_ready(run(start, data))
                    spent.append(1e3 * (time.process_time() - began))
                row[name] = {"ms": min(spent), "error": float(found.error[0])}
                row[name]["products"] = int(found.products[0])
            right = all(side["error"] <= TOLERANCE for side in row.values())
            ratio = row["products"]["ms"] / row["factored"]["ms"]
            if n == 512 and condition == 1:
                samples.append(ratio if right else float("inf"))
            key = f"seed {seed}, condition {condition:g}, n {n}"
            rows[key] = row
            settings.tell(f"   {key}: {ratio:.2f} {row}")
    return {"products_vs_factors": Measured(samples, detail={"rows": rows})}


SPEED_GROUP = Group(
    "lsq",
    (
        Bar("lsq_vs_best", "<=", 1.0, "64 x 256 x 16, both passes: time / best right optimistix"),
        Bar("lsq_vs_lm", "<=", 0.25, "the same / optimistix LM with its defaults"),
    ),
    measure_speed,
)
NOISE_GROUP = Group(
    "noise",
    (Bar("lsq_noise", ">=", 1.0, "share of lanes converged, data that the basis cannot explain"),),
    measure_noise,
)
GRADIENT_GROUP = Group(
    "gradient",
    (Bar("grad_error", "<=", 1e-6, "relative error of gradients, condition of J 1e1 to 1e5"),),
    measure_gradient,
)
SIZE_GROUP = Group(
    "size",
    (Bar("products_vs_factors", "<=", 0.5, "512 unknowns: time by products / by factoring J'J"),),
    measure_size,
)
