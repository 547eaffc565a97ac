"""Diffusion-sorption learned from its equation alone: one hard constraint, experts, a soft one, and
what interpolation makes of as many reference solutions as there are samples.

All networks are Fourier neural operators of one size and see the same samples, of which the layers
use the equation only. Test soils are others. Errors are relative in L2 beside a reference on a grid
four times as fine.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.soft import fields, newton_step, optimizer, relative, summary, trained_soft
from tolerax.problems import Boxes, HardConstrained, RandomAssignment
from tolerax.problems.library import DiffusionSorption, SorptionBasis

GRID, SAMPLES, TESTS, BATCH, RATE = (40, 33), 64, 32, 4, 3e-3
NEWTON = 4  # of the tests
BASIS, FACES = 16, 100.0
ONE, EXPERTS = (1, 1), (4, 2)


def steps(settings: Settings) -> int:
    return 150 if settings.quick else 600


@functools.cache
def data(seed: int) -> tuple[DiffusionSorption, Any, Any, np.ndarray]:
    """The family, training and test soils, and the fields of the latter."""
    family = DiffusionSorption(*GRID)
    one, two = jax.random.split(jax.random.key(seed))
    train, test = family.sample(one, SAMPLES), family.sample(two, TESTS)
    return family, train, test, np.asarray(family.solve(test, cache=True))


ROUTERS: dict[str, Callable[[], Any]] = {
    "single": lambda: Boxes(GRID, ONE),
    "single, 128 functions": lambda: Boxes(GRID, ONE),
    "experts": lambda: Boxes(GRID, EXPERTS),
    "experts, 1e-8": lambda: Boxes(GRID, EXPERTS),
    "random experts": lambda: RandomAssignment(GRID, 8, key=jax.random.key(0)),
}


@functools.cache
def trained(kind: str, seed: int, count: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The test error of one kind of layer, and what its training took; tells now and then how it
    goes."""
    family, train, test, reference = data(seed)
    outputs = 128 if kind == "single, 128 functions" else BASIS
    network = SorptionBasis(family, outputs, key=jax.random.key(seed + 10_000))
    faces = FACES if kind.startswith("experts") else None
    layer = HardConstrained(network, family.equation, ROUTERS[kind](), faces=faces)
    forcing = tolerax.Forcing.fixed(1e-8) if kind.endswith("1e-8") else tolerax.Forcing()
    began = time.perf_counter()

    def said(state: Any) -> None:
        step = int(state.step)
        if step % 20 == 0 or step == 1:
            now = (
                f"tolerance {state.tolerance[step - 1]:.1e}, evaluations {state.evaluations.sum()}"
            )
            tell(f"      {kind}, step {step}, {time.perf_counter() - began:.0f} s, {now}")

    done = tolerax.train(
        layer,
        train,
        optimizer(RATE, count),
        steps=count,
        batch=BATCH,
        key=jax.random.key(seed + 20_000),
        forcing=forcing,
        callback=said,
    )
    seconds = time.perf_counter() - began
    field = eqx.filter_jit(lambda layer, soils: layer(soils))(done.layer, test)
    return summary(done, field.u, field.jump, reference, seconds)


@functools.cache
def soft(seed: int, count: int) -> dict[str, Any]:
    """The operator with one output, trained on the same residuals for `count` steps; and its
    fields after one Newton step on the residuals at all points of the grid."""
    family, train, test, reference = data(seed)
    network = SorptionBasis(family, 1, polynomials=False, key=jax.random.key(seed + 10_000))
    rule = optimizer(RATE, count)
    network, seconds = trained_soft(family.equation, network, train, rule, count, BATCH)
    u = fields(family.equation, network, test)
    free = np.ones(GRID, bool)
    free[0], free[:, 0] = False, False  # what the ansatz holds
    few = jax.tree.map(lambda leaf: leaf[:NEWTON], test)
    moved = newton_step(family.equation, u[:NEWTON], few, free)
    return {
        "error": float(np.mean(relative(u, reference))),
        "after a Newton step": float(np.mean(relative(moved, reference[:NEWTON]))),
        "seconds": round(seconds, 1),
    }


@functools.cache
def projected(seed: int, count: int) -> dict[str, Any]:
    """A network with as many outputs as a layer, whose mean is trained on the residuals without
    a layer, and what layers make of it afterwards."""
    family, train, test, reference = data(seed)
    network = SorptionBasis(family, BASIS, key=jax.random.key(seed + 10_000))
    rule = optimizer(RATE, count)
    network, seconds = trained_soft(family.equation, network, train, rule, count, BATCH)
    found = {"before": fields(family.equation, network, test)}
    for kind, faces in (("single", None), ("experts", FACES)):
        layer = HardConstrained(network, family.equation, ROUTERS[kind](), faces=faces)
        found[kind] = eqx.filter_jit(lambda layer, soils: layer(soils))(layer, test).u
    errors = {name: float(np.mean(relative(u, reference))) for name, u in found.items()}
    return {**errors, "seconds": round(seconds, 1)}


@functools.cache
def interpolated(seed: int) -> dict[str, float]:
    """Test errors of interpolations of reference fields of all training soils, which the layers do
    not have: the nearest soil; POD with coefficients by quadratic least squares and by Gaussian
    kernels, each with the numbers that suit the test best."""
    family, train, test, reference = data(seed)
    known = np.asarray(family.solve(train, cache=True)).reshape(SAMPLES, -1)

    def parameters(soils: Any) -> np.ndarray:
        x = np.linspace(0, np.pi, soils.u0.shape[1])
        waves = np.cos(np.arange(4)[None] * x[:, None])
        found = np.linalg.lstsq(waves, np.asarray(soils.u0).T)[0].T
        rest = [np.asarray(a)[:, None] for a in (soils.diffusivity, soils.exponent, soils.inlet)]
        return np.concatenate([found, *rest], axis=1)

    p, q = parameters(train), parameters(test)
    q, p = (q - p.mean(axis=0)) / p.std(axis=0), (p - p.mean(axis=0)) / p.std(axis=0)
    apart = np.linalg.norm(q[:, None] - p[None], axis=2)
    errors = {"nearest": known[np.argmin(apart, axis=1)]}
    mean = known.mean(axis=0)
    modes = np.linalg.svd(known - mean[None], full_matrices=False)[2][:24]
    w = (known - mean[None]) @ modes.T

    def quadratic(p: np.ndarray) -> np.ndarray:
        products = [p[:, i] * p[:, j] for i in range(p.shape[1]) for j in range(i + 1)]
        return np.concatenate([np.ones((len(p), 1)), p, np.stack(products, axis=1)], axis=1)

    A, B = quadratic(p), quadratic(q)
    for ridge in (1e-6, 1e-3, 1e-1, 1.0):
        fit = np.linalg.solve(A.T @ A + ridge * np.eye(A.shape[1]), A.T @ w)
        errors[f"quadratic {ridge:g}"] = B @ fit @ modes + mean[None]
    between = np.linalg.norm(p[:, None] - p[None], axis=2)
    for width in (2.0, 4.0, 8.0, 16.0):
        for ridge in (1e-8, 1e-5, 1e-3):
            kernel = np.exp(-((between / width) ** 2) / 2) + ridge * np.eye(SAMPLES)
            fit = np.linalg.solve(kernel, w)
            errors[f"kernel {width:g} {ridge:g}"] = (
                np.exp(-((apart / width) ** 2) / 2) @ fit @ modes + mean[None]
            )
    return {
        name: float(np.mean(relative(u.reshape(reference.shape), reference)))
        for name, u in errors.items()
    }


def measure(settings: Settings) -> dict[str, Measured]:
    """Ratios of mean test errors after equal steps. Without --quick details hold a soft constraint
    with four times as many, layers after a training without, one layer of 128 functions and experts
    at random points."""
    count, hard, moe, pod, rows = steps(settings), [], [], [], {}
    for seed in settings.seeds:
        found = {"soft": soft(seed, count)}
        kinds = ["single", "experts"]
        if not settings.quick:
            found["soft, 4 times the steps"] = soft(seed, 4 * count)
            found["projected afterwards"] = projected(seed, count)
            settings.tell(f"   seed {seed}, projected afterwards: {found['projected afterwards']}")
            kinds += ["single, 128 functions", "random experts"]
        for kind in kinds:
            found[kind] = trained(kind, seed, count, settings.tell)
            settings.tell(f"   seed {seed}, {kind}: {found[kind]}")
        peers = interpolated(seed)
        best = min(peers, key=lambda name: peers[name])
        settings.tell(f"   seed {seed}, soft {found['soft']}, {best}: {peers[best]:.4g}")
        if not settings.quick:
            settings.tell(f"   four times the steps: {found['soft, 4 times the steps']}")
        error = {name: row["error"] for name, row in found.items() if "error" in row}
        hard.append(error["single"] / error["soft"])
        moe.append(error["experts"] / error["single"])
        pod.append(error["experts"] / peers[best])
        rows[f"seed {seed}"] = {**found, "interpolation": peers}
    return {
        "ds_hard_over_soft": Measured(hard, detail={"rows": rows}),
        "ds_moe_over_single": Measured(moe),
        "ds_vs_pod": Measured(pod),
    }


def measure_inexact(settings: Settings) -> dict[str, Measured]:
    """Evaluations of residuals within training, with tolerances that follow the gradient and with
    1e-8 throughout, both with warm starts; none where the test error is more than 5 % larger."""
    # Two trainings with tied experts, of which one solves to 1e-8 all the time.
    count, ratios, rows = 40 if settings.quick else steps(settings), [], {}
    for seed in settings.seeds:
        kinds = ("experts", "experts, 1e-8")
        ours, fixed = (trained(kind, seed, count, settings.tell) for kind in kinds)
        fine = ours["error"] <= 1.05 * fixed["error"]
        ratios.append(ours["evaluations"] / fixed["evaluations"] if fine else np.inf)
        rows[f"seed {seed}"] = {"adaptive": ours, "fixed": fixed}
        settings.tell(f"   seed {seed}: {rows[f'seed {seed}']}")
    return {"inexact_saving": Measured(ratios, detail={"rows": rows})}


GROUP = Group(
    "ds",
    (
        Bar("ds_hard_over_soft", "<=", 0.15, "diffusion-sorption: error of one layer / soft"),
        Bar("ds_moe_over_single", "<=", 0.6, "8 experts / one, of 16 functions each"),
        Bar("ds_vs_pod", "<=", 1.0, "8 experts / best interpolation of 64 reference solutions"),
    ),
    measure,
)
INEXACT_GROUP = Group(
    "inexact",
    (Bar("inexact_saving", "<=", 0.5, "inner evaluations, adaptive / fixed 1e-8, equal error"),),
    measure_inexact,
)
