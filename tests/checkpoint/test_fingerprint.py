"""Fingerprints tell problems and solvers apart, the same in every process."""

import functools
import os
import re
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.states import Colour, Pair, State, make, relu
from tolerax.checkpoint import Checkpoint, CheckpointError, fingerprint

# Fingerprints


def scaled(factor, log):
    def function(x):
        log.append(x)
        return factor * x

    return function


def fingerprints():
    module_with_parts = State(
        memory=[jnp.arange(3.0), jax.random.key(1), None, 2.5, "text"],
        status=Colour.blue,
        key=functools.partial(scaled(2.0, []), 3),
        carry=jax.jit(relu),
        function=(scaled(jnp.ones(2), []), np.float32, {"a", "b", "c"}, object(), jnp.sin),
    )
    return [fingerprint(module_with_parts), fingerprint({1: relu, "a": (eqx.nn.Linear, len)})]


def test_fingerprint_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys, runpy, jax; jax.config.update('jax_enable_x64', True); "
        "print(*runpy.run_path(sys.argv[1], run_name='m')['fingerprints']())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, __file__],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert fingerprints() == fingerprints()


def written(source, line=1):
    """`fun` as this source at this line of a file says."""
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile("\n" * line + source, "script.py", "exec"), names)
    return names["fun"]


SOURCE = "def fun(x):\n    return [(y - 2) ** 2 for y in x if y in {1, 2, 3}]"


def equivalent_and_different():
    x = jnp.arange(3.0)
    yield "array bits", x, jnp.arange(3.0), x.at[2].add(1e-15)
    yield "sign of zero", jnp.zeros(2), np.zeros(2), -jnp.zeros(2)
    yield "dtype", x, np.arange(3.0), x.astype(jnp.float32)
    yield "shape", x, x, x[None]
    yield "extended dtype", x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), x.astype(jnp.float16)
    yield "key", jax.random.key(1), jax.random.key(1), jax.random.key(2)
    yield "key kind", jax.random.key(1), jax.random.key(1), jax.random.key_data(jax.random.key(1))
    yield "number", 1.0, 1.0, 1
    yield "string", "a", "a", b"a"
    yield "nesting", [[1], 2], [[1], 2], [[1, 2]]
    yield "order of a dictionary", {"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}
    yield "static field", make(), make(), make(size=11)
    yield "function", relu, relu, scaled
    yield "edited code", written(SOURCE), written(SOURCE, 9), written(SOURCE.replace("- 2", "- 5"))
    yield "edited name", written(SOURCE), written(SOURCE), written(SOURCE.replace("in x", "in z"))
    yield "lambda", lambda x: x + 1, lambda x: x + 1, lambda x: x + 2
    yield "closed-over number", scaled(2.0, []), scaled(2.0, []), scaled(3.0, [])
    yield "closed-over array", scaled(x, []), scaled(+x, []), scaled(x + 1, [])
    yield "closed-over log", scaled(2.0, []), scaled(2.0, [1, 2]), scaled(2, [])
    yield "jitted", jax.jit(scaled(2.0, [])), jax.jit(scaled(2.0, [])), jax.jit(scaled(3.0, []))
    yield "custom rule", jax.custom_jvp(relu), jax.custom_jvp(relu), jax.custom_jvp(scaled)
    yield "bound", make().__eq__, make().__eq__, make(1).__eq__
    yield "class", State, State, Pair
    yield "enumeration", Colour.red, Colour.red, Colour.blue
    yield "struct", jax.ShapeDtypeStruct((2,), float), jax.ShapeDtypeStruct((2,), float), x


@pytest.mark.parametrize(
    ("name", "one", "same", "other"),
    [pytest.param(*c, id=c[0]) for c in equivalent_and_different()],
)
def test_fingerprint_tells_apart(name, one, same, other):
    assert re.fullmatch("[0-9a-f]{32}", fingerprint(one))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)


def test_fingerprint_ends_on_cycles():
    def recursive(n):
        return n if n == 0 else recursive(n - 1)

    cycle: list[Any] = [1]
    cycle.append(cycle)
    assert fingerprint(recursive) == fingerprint(recursive)
    assert fingerprint(cycle) == fingerprint(cycle)


def test_functions_in_static_fields_of_a_state_count_by_name_only(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.save(make(function=scaled(2.0, [])))
    loaded, _ = checkpoint.load(make(function=scaled(3.0, [])))
    assert loaded.function(1.0) == 3.0  # static parts come from the template
    with pytest.raises(CheckpointError, match="has function: "):
        checkpoint.load(make(function=relu))
