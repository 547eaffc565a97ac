"""What is saved comes back to the bit, and only into what it was saved from."""

import json
import os
import re
import stat
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.states import Pair, State, bits, blank, make, relu
from tolerax.checkpoint import Checkpoint, CheckpointError

# Round trips

NATIVE = "bool int8 uint16 int32 uint64 float16 float32 float64 complex64 complex128"
EXTENDED = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
DTYPES = [np.dtype(name) for name in [*re.split(" ", NATIVE), *EXTENDED]]


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))  # any bits: NaN payloads, -0, ...
    if dtype.kind == "b":
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(data, np.uint8).copy().view(dtype).reshape(shape)
    if draw(st.booleans()):
        return jnp.asarray(array)
    return array[()] if shape == () and dtype.isbuiltin == 1 and draw(st.booleans()) else array


@st.composite
def keys(draw):
    key = jax.random.key(
        draw(st.integers(0, 9)), impl=draw(st.sampled_from(["threefry2x32", "rbg"]))
    )
    return jax.random.split(key, 2) if draw(st.booleans()) else key


leaves = (
    arrays()
    | keys()
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers(allow_nan=True)
    | st.sampled_from(["text", np.sin, jnp.tanh, len])
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(State, inner, inner, inner, inner, st.integers(0, 3))
    ),
    max_leaves=8,
)


@hypothesis.given(tree=trees)
@hypothesis.settings(max_examples=80)
def test_round_trip_keeps_every_bit(tmp_path_factory, tree):
    checkpoint = Checkpoint(tmp_path_factory.mktemp("run") / "state")
    checkpoint.save(tree)
    loaded, manifest = checkpoint.load(blank(tree))
    assert bits(loaded) == bits(tree)
    assert manifest["format"] == 1


def test_weird_layouts_round_trip(tmp_path):
    base = np.arange(24.0).reshape(2, 3, 4)
    tree = {
        "transposed": base.T,
        "strided": base[:, ::2, ::-1],
        "big_endian": base.astype(">f8"),
        "long": np.asarray([1 / np.longdouble(3)]),
        "empty": np.zeros((0, 3)),
    }
    checkpoint = Checkpoint(tmp_path / "state")
    checkpoint.save(tree)
    loaded, _ = checkpoint.load(blank(tree))
    for name, value in tree.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_arrays_take_their_kind_from_the_template(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state")
    checkpoint.save(np.arange(3.0))
    loaded, _ = checkpoint.load(jnp.zeros(3))
    assert isinstance(loaded, jax.Array)
    loaded, _ = checkpoint.load(jax.ShapeDtypeStruct((3,), jnp.float64))
    assert isinstance(loaded, jax.Array)
    device = jax.devices()[0]
    loaded, _ = checkpoint.load(jax.device_put(jnp.zeros(3), device))
    assert loaded.committed
    np.testing.assert_array_equal(loaded, np.arange(3.0))


def test_keys_give_the_same_draws(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state")
    checkpoint.save(jax.random.key(7))
    key, _ = checkpoint.load(jax.random.key(0))
    assert jax.random.normal(key) == jax.random.normal(jax.random.key(7))
    with pytest.raises(CheckpointError, match="has the whole tree: threefry2x32 random key"):
        checkpoint.load(jax.random.key(0, impl="rbg"))


def test_equal_states_make_equal_files(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state")
    first, second = (checkpoint.save(make(3), {"step": 1}).read_bytes() for _ in range(2))
    assert first == second


def test_numpy_opens_the_file_and_the_manifest_can_be_read(tmp_path):
    file = Checkpoint(tmp_path / "state").save(
        make(2.0),
        {"solver": "MAID", "step": jnp.asarray(4), "work": {"values": np.int64(3)}},
    )
    with np.load(file, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["1"], np.full((10, 3), 2.0))
        manifest = json.loads(archive["manifest.json"])
    assert (manifest["solver"], manifest["step"], manifest["work"]) == ("MAID", 4, {"values": 3})
    assert manifest["versions"].keys() == {"jax", "equinox", "numpy", "tolerax", "python"}
    entry = next(entry for entry in manifest["tree"] if entry["path"] == "memory['s']")
    assert entry == {
        "path": "memory['s']",
        "kind": "array",
        "dtype": "float64",
        "shape": [10, 3],
    }


# Files come and go


def test_keeps_the_last_ones_and_touches_nothing_else(tmp_path):
    strangers = ["run2.00000001.npz", "run.00000001.npz.bak", "run.npz", ".run2.7.tmp", "run.1.npz"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".run.123.tmp").write_text("left by a killed run")
    checkpoint = Checkpoint(tmp_path / "run.npz", keep=2)
    assert not checkpoint.exists()
    for value in range(5):
        checkpoint.save({"x": value})
    assert checkpoint.exists()
    assert [file.name for file in checkpoint.files()] == ["run.00000004.npz", "run.00000005.npz"]
    assert {p.name for p in tmp_path.iterdir()} == {
        *strangers,
        *(f.name for f in checkpoint.files()),
    }
    assert checkpoint.load({"x": 0})[0] == {"x": 4}
    assert checkpoint.load({"x": 0}, previous=True)[0] == {"x": 3}
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 2 before the newest \(2 files found\)"
    ):
        checkpoint.load({"x": 0}, previous=2)


def test_nothing_there(tmp_path):
    checkpoint = Checkpoint(tmp_path / "missing" / "run")
    assert not checkpoint.exists()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint \(0 files found\)"):
        checkpoint.load({})
    with pytest.raises(CheckpointError, match=r"folder .*missing does not exist: create it"):
        checkpoint.save({})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_folder(tmp_path):
    Checkpoint(tmp_path / "run").save({"x": 1})
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            Checkpoint(tmp_path / "run").save({"x": 2})
        assert Checkpoint(tmp_path / "run").load({"x": 0})[0] == {"x": 1}
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "folder/.hidden"}, "plain file name"),
        ({"path": "folder/a b"}, "plain file name"),
        ({"path": "folder/.."}, "plain file name"),
        ({"path": "run\0"}, "plain file name"),
        ({"path": "run", "keep": 0}, "keep must be at least 1, got 0"),
        ({"path": "run", "every_seconds": 0.0}, "every_seconds must be positive"),
        ({"path": "run", "every_seconds": float("nan")}, "every_seconds must be positive"),
        ({"path": "run", "every_steps": 0}, "every_steps must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**arguments)


def test_what_cannot_be_saved_is_named(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    with pytest.raises(TypeError, match=r"\['a'\] has dtype object"):
        checkpoint.save({"a": np.array([object()])})
    with pytest.raises(TypeError, match=r"memory is traced"):
        jax.jit(lambda x: checkpoint.save(State(x, 0, 0)))(1.0)
    with pytest.raises(ValueError, match="entry 'tree'"):
        checkpoint.save({}, {"tree": 1})
    with pytest.raises(TypeError, match="not of a JSON type"):
        checkpoint.save({}, {"solver": object()})
    with pytest.raises(TypeError, match="template needs a real key"):
        checkpoint.save(jax.eval_shape(lambda: jax.random.key(0)))
    assert list(tmp_path.iterdir()) == []


# A checkpoint of something else


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            make(memory=5),
            "the checkpoint has memory['s']: float64 of shape (10, 3), this run needs float64 of "
            "shape (5, 3)",
        ),
        (
            eqx.tree_at(lambda s: s.memory["s"], make(), jnp.zeros((10, 3), jnp.float32)),
            "memory['s']: float64 of shape (10, 3), this run needs float32 of shape (10, 3)",
        ),
        (make(size=11), "the checkpoint has size: 10, this run needs 11"),
        (make(function=relu), "has function: None, this run needs tests"),
        (
            eqx.tree_at(lambda s: s.memory, make(), {"s": jnp.zeros((10, 3))}),
            "the checkpoint has memory['count']: int64 of shape (), which this run has not",
        ),
        (
            eqx.tree_at(lambda s: s.memory, make(), {"s": jnp.zeros((10, 3)), "d": 1, "count": 1}),
            "has memory['count']: int64 of shape (), this run needs a Python int",
        ),
        (
            eqx.tree_at(lambda s: s.carry, make(), jnp.zeros(2), is_leaf=lambda x: x is None),
            "the checkpoint has carry: None, this run needs float64 of shape (2,)",
        ),
        ({"x": 1}, "has the whole tree: a "),
        ([make(), 1], "has the whole tree: a "),
    ],
)
def test_other_structure_is_refused_by_name(tmp_path, template, message):
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.save(make())
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        checkpoint.load(template)
    assert "use the same problem, solver and options, or a new path" in str(caught.value)
    assert caught.value.file == checkpoint.files()[0]


def test_longer_and_shorter_trees_are_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.save([1.0, 2.0])
    with pytest.raises(CheckpointError, match=r"run needs \[2\]: a Python float, which the ch"):
        checkpoint.load([0.0, 0.0, 0.0])
    with pytest.raises(CheckpointError, match=r"checkpoint has \[1\]: a Python float, which"):
        checkpoint.load([0.0])


def test_expected_entries(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.save({}, {"solver": "MAID", "problem": "abc"})
    checkpoint.load({}, {"solver": "MAID", "problem": "abc"})
    with pytest.raises(CheckpointError, match="has solver 'MAID', this run has 'HOAG'"):
        checkpoint.load({}, {"solver": "HOAG", "problem": "abc"})
    with pytest.raises(CheckpointError, match="has options None, this run has 'x'"):
        checkpoint.load({}, {"options": "x"})


def test_renamed_statuses_are_noticed(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")

    def mood(**names) -> Any:
        body = {"__module__": "m", **names}
        return type(eqx.Enumeration)("Mood", (eqx.Enumeration,), body)  # pyright: ignore

    Mood, same = mood(good="g", bad="b"), mood(good="g", bad="other words")
    longer = mood(new="n", good="g", bad="b")
    checkpoint.save(Mood.bad)
    checkpoint.load(same.good)
    with pytest.raises(CheckpointError, match=r"_enumeration: m\.Mood"):
        checkpoint.load(longer.good)
