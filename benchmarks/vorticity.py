"""Navier-Stokes learned from its equation alone: one hard constraint, experts, and a soft one.

All networks are Fourier neural operators of one size that see the same flows, of which they use
the equation only. Test flows are others. Errors are relative in L2 beside a pseudo-spectral
reference on a grid twice as fine.
"""

import functools
import time
from typing import Any

import equinox as eqx
import jax
import numpy as np

import tolerax
from benchmarks.frame import Bar, Group, Measured, Settings
from benchmarks.soft import fields, optimizer, relative, summary, trained_soft
from tolerax.problems import Boxes, HardConstrained, RandomAssignment
from tolerax.problems.library import NavierStokes, VorticityBasis

FRAMES, BATCH, RATE, BASIS = 9, 2, 3e-3, 48
# Two halves of the square by an early and a late part, which blend over half of their length.
EXPERTS = {"parts": (2, 2, 1), "overlap": (4, 8, 0), "periodic": (False, True, True)}
JOINT = ("experts", "random experts")
MORE = {**EXPERTS, "parts": (2, 2, 2), "overlap": (4, 8, 8)}  # at inference, in the details


def size(settings: Settings) -> tuple[int, int, int]:
    """Steps of training, flows to train on and to test on."""
    return (60, 32, 8) if settings.quick else (400, 128, 16)


@functools.cache
def data(seed: int, train: int, test: int) -> tuple[NavierStokes, Any, Any, np.ndarray]:
    """The family, flows to train on and to test on, and the fields of the latter."""
    family = NavierStokes(32, FRAMES)
    one, two = jax.random.split(jax.random.key(seed))
    flows = family.sample(two, test)
    return family, family.sample(one, train), flows, np.asarray(family.solve(flows, cache=True))


def network(family: NavierStokes, seed: int, outputs: int) -> VorticityBasis:
    """Before training; the same operator but for its last matrix whatever `outputs`, and nothing
    else where one output is the solution."""
    key = jax.random.key(seed + 10_000)
    return VorticityBasis(family, outputs, hidden=64, start=outputs > 1, key=key)


def layer(kind: str, family: NavierStokes, seed: int) -> HardConstrained:
    """One layer, experts, or a control."""
    router = Boxes(family.grid, (1, 1, 1))
    if kind.startswith("experts"):
        router = Boxes(family.grid, **EXPERTS)
    elif kind == "random experts":
        router = RandomAssignment(family.grid, 4, key=jax.random.key(0))
    outputs = 4 * BASIS if kind == "single, 192 functions" else BASIS
    basis = network(family, seed, outputs)
    if kind == "single, 192 functions":  # which need as many to be made of
        basis = VorticityBasis(family, outputs, hidden=outputs, key=jax.random.key(seed + 10_000))
    return HardConstrained(basis, family.equation, router, joint=kind in JOINT)


def solved(layer: HardConstrained, flows: Any) -> Any:
    """Fields and jumps, of a few flows at a time: joint experts have large matrices."""
    pieces = []
    for first in range(0, len(flows.w0), BATCH):
        some = jax.tree.map(lambda leaf, k=first: leaf[k : k + BATCH], flows)
        pieces.append(_solved(layer, some))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


@eqx.filter_jit
def _solved(layer: HardConstrained, flows: Any) -> Any:
    field = layer(flows)
    return {"u": field.u, "jump": field.jump}


def trained(kind: str, seed: int, count: int, samples: int, tests: int) -> dict[str, Any]:
    """The test error of one kind of layer, and what its training took."""
    family, train, test, reference = data(seed, samples, tests)
    began = time.perf_counter()
    done = tolerax.train(
        layer(kind, family, seed),
        train,
        optimizer(RATE, count),
        steps=count,
        batch=BATCH,
        key=jax.random.key(seed + 20_000),
    )
    seconds = time.perf_counter() - began
    field, row = solved(done.layer, test), {}
    if kind == "experts":
        more = HardConstrained(
            done.layer.network, family.equation, Boxes(family.grid, **MORE), joint=True
        )
        u = solved(more, test)["u"]
        row["8 experts at inference"] = float(np.mean(relative(u, reference)))
    return row | summary(done, field["u"], field["jump"], reference, seconds)


def soft(seed: int, count: int, samples: int, tests: int) -> dict[str, Any]:
    """The same network with one output, trained on the same residuals."""
    return penalized(1, seed, count, samples, tests)[1]


def penalized(
    outputs: int, seed: int, count: int, samples: int, tests: int
) -> tuple[VorticityBasis, dict[str, Any]]:
    """A network whose mean output is trained on the residuals without a layer."""
    family, train, test, reference = data(seed, samples, tests)
    start, rule = network(family, seed, outputs), optimizer(RATE, count)
    done, seconds = trained_soft(family.equation, start, train, rule, count, BATCH)
    error = float(np.mean(relative(fields(family.equation, done, test), reference)))
    return done, {"error": error, "seconds": round(seconds, 1)}


def projected(seed: int, count: int, samples: int, tests: int) -> dict[str, Any]:
    """The same with the outputs of a layer, and what layers make of it afterwards."""
    family, _, test, reference = data(seed, samples, tests)
    done, row = penalized(BASIS, seed, count, samples, tests)
    for kind in ("single", "experts"):
        with_it = eqx.tree_at(lambda layer: layer.network, layer(kind, family, seed), done)
        u = solved(with_it, test)["u"]
        row[f"{kind}, afterwards"] = float(np.mean(relative(u, reference)))
    return row


def measure(settings: Settings) -> dict[str, Measured]:
    """Ratios of mean test errors after equal steps on equal flows, at all points of the grid."""
    hard, moe, rows = [], [], {}
    kinds = ["single", "experts"]
    if not settings.quick:
        kinds += ["single, 192 functions", "random experts", "experts, each alone"]
    for seed in settings.seeds:
        found = {"soft": soft(seed, *size(settings))}
        settings.tell(f"   seed {seed}, soft: {found['soft']}")
        if not settings.quick:
            found["projected afterwards"] = projected(seed, *size(settings))
        for kind in kinds:
            found[kind] = trained(kind, seed, *size(settings))
            settings.tell(f"   seed {seed}, {kind}: {found[kind]}")
        _, _, test, reference = data(seed, *size(settings)[1:])
        still = np.broadcast_to(np.asarray(test.w0)[:, None], reference.shape)
        found["persistence"] = {"error": float(np.mean(relative(still, reference)))}
        hard.append(found["single"]["error"] / found["soft"]["error"])
        moe.append(found["experts"]["error"] / found["single"]["error"])
        rows[f"seed {seed}"] = found
    return {
        "ns_hard_over_soft": Measured(hard, detail={"rows": rows}),
        "ns_moe_over_single": Measured(moe),
    }


GROUP = Group(
    "ns",
    (
        Bar("ns_hard_over_soft", "<=", 0.65, "Navier-Stokes, 32 x 32: error of one layer / soft"),
        Bar("ns_moe_over_single", "<=", 0.75, "4 experts / one, of 48 functions each"),
    ),
    measure,
)
