"""Equations that hold exactly in lanes: in float32, and spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tolerax.inner.lane_adjoint import solve_hessian
from tolerax.inner.lane_kkt import hold, solve_held
from tolerax.inner.levenberg_marquardt import BatchedLevenbergMarquardt, LeastSquaresResult
from tolerax.inner.residuals import structured
from tolerax.status import PointStatus

LANES, N = 3, 2
FUN = structured(lambda w, y: jnp.cos(jnp.arange(1, 6, dtype=w.dtype)) * w[0] + w[1] ** 2 - y)


def total(w, m):
    """A sum whose terms are rounded."""
    return (jnp.mean(jnp.sin(w[0] * jnp.linspace(0, 2, 500, dtype=w.dtype)) + w[1]) - m)[None]


def found(dtype, failed=False):
    """Where the equations do not hold."""
    w = jnp.ones((LANES, N), dtype) * jnp.arange(1, LANES + 1, dtype=dtype)[:, None]
    lane, whole = jnp.ones(LANES, dtype), jnp.ones(LANES, jnp.int32)
    status = jax.vmap(lambda _: PointStatus.where(failed, PointStatus.failed, PointStatus.ok))(lane)
    return LeastSquaresResult(w, lane, lane, lane, whole, whole, status, lane)


def data(dtype):
    return jnp.ones((LANES, 5), dtype), jnp.asarray([0.9, 1.4, 2.0], dtype)


@pytest.mark.parametrize(("dtype", "holds"), [("float64", 1e-12), ("float32", 1e-5)])
def test_equations_hold_to_the_rounding_of_the_precision(dtype, holds):
    y, m = data(dtype)
    run = jax.jit(lambda y, m: hold(FUN, total, found(dtype), y, m, 1e-3, 1e-4))
    answer, multipliers = run(y, m)
    assert answer.w.dtype == dtype
    assert np.all(np.asarray(answer.status == PointStatus.ok))
    assert np.abs(jax.vmap(total)(answer.w, m)).max() <= holds
    assert np.all(multipliers != 0)
    # The steps count beside the one evaluation that there was.
    assert np.all(answer.evaluations > 2)


def loops_on_one_device(jaxpr):
    """Loops that are not spread over devices."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("scan", "while"):
            found.append(name)
        if name != "shard_map":
            for inner in jaxprs_in_params(equation.params):
                found += loops_on_one_device(inner)
    return found


def test_lanes_with_equations_and_conjugate_gradients_are_spread_over_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("lanes",))
    places = {"block": 1, "sharding": NamedSharding(mesh, PartitionSpec("lanes"))}
    (y, m), start = data("float64"), found("float64")
    both = jnp.concatenate([start.w, start.w[:, :1]], axis=1)
    options = {"ridge": start.cost, "free": jnp.ones((LANES, N), bool), "hessian": "cg"}
    programs = [
        lambda: hold(FUN, total, start, y, m, 1e-3, 1e-4, **places),
        lambda: solve_held(FUN, total, both, y, m, both, 1e-3, 1, **places),
        lambda: solve_hessian(FUN, start.w, y, start.w, **options, **places),
        lambda: BatchedLevenbergMarquardt(**places)(FUN, start.w, y),
    ]
    for program in programs:
        jaxpr = jax.make_jaxpr(program)().jaxpr
        assert "shard_map" in str(jaxpr)
        assert not loops_on_one_device(jaxpr)
