import collections
import errno
import functools
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
import zipfile
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tolerax import checkpoint as module
from tolerax.checkpoint import Checkpoint, CheckpointError, fingerprint


class Colour(eqx.Enumeration):
    red = "Red."
    blue = "Blue."


class State(eqx.Module):
    memory: Any
    status: Any
    key: Any
    carry: Any = None
    size: int = eqx.field(static=True, default=10)
    function: Any = eqx.field(static=True, default=None)


def make(value=0.0, memory=10, **static):
    return State(
        memory={"s": jnp.full((memory, 3), value), "count": jnp.asarray(int(value))},
        status=Colour.red,
        key=jax.random.key(int(value)),
        **static,
    )


def bits(tree):
    """Everything about the leaves that must survive, comparable with ==."""

    def of(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(leaf))
            return "key", str(jax.random.key_impl(leaf)), data.shape, data.tobytes()
        if isinstance(leaf, np.ndarray | np.generic | jax.Array):
            kind = "jax" if isinstance(leaf, jax.Array) else type(leaf)
            return kind, str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
        if isinstance(leaf, float):
            return float, np.float64(leaf).tobytes()
        if isinstance(leaf, complex):
            return complex, np.complex128(leaf).tobytes()
        return type(leaf), leaf

    return jax.tree.structure(tree), [of(leaf) for leaf in jax.tree.leaves(tree)]


def blank(tree):
    """A template: the same structure, other values."""

    def of(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jnp.zeros_like(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array):
            return jnp.zeros_like(leaf)
        if isinstance(leaf, np.ndarray):
            return np.zeros_like(leaf)
        if isinstance(leaf, np.generic):
            return leaf.dtype.type(0)
        return type(leaf)() if isinstance(leaf, bool | int | float | complex) else leaf

    return jax.tree.map(of, tree)


# Round trips

Pair = collections.namedtuple("Pair", ["left", "right"])
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


def relu(x):
    return x


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


# Damage: none of it is loaded, all of it gets the same kind of error


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two checkpoints, 1.0 and 2.0, and the bytes of the newer one."""
    checkpoint = Checkpoint(tmp_path_factory.mktemp("pair") / "run")
    checkpoint.save(make(1.0, memory=2))
    checkpoint.save(make(2.0, memory=2))
    newest = checkpoint.files()[-1]
    return checkpoint, newest, newest.read_bytes()


def refused(pair, content):
    checkpoint, newest, _ = pair
    newest.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(make(memory=2))
    assert str(newest) in str(caught.value)
    return caught.value


def test_truncation_anywhere(pair):
    checkpoint, newest, content = pair
    for length in [*range(0, len(content), 64), *range(len(content) - 130, len(content))]:
        assert refused(pair, content[:length]).previous == checkpoint.files()[0]
    error = refused(pair, content[:-1])
    assert "run.00000001.npz: move newer files away, or call load(..., previous=1)" in str(error)
    loaded, _ = checkpoint.load(make(memory=2), previous=1)
    assert bits(loaded) == bits(make(1.0, memory=2))
    newest.write_bytes(content)
    assert bits(checkpoint.load(make(memory=2))[0]) == bits(make(2.0, memory=2))


def test_any_flipped_bit(pair):
    _, _, content = pair
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        refused(pair, bytes(damaged))


def test_appended_bytes(pair):
    refused(pair, pair[2] + b"\0")
    refused(pair, pair[2] + pair[2])


def test_every_older_one_damaged_too(pair):
    checkpoint, _, content = pair
    oldest = checkpoint.files()[0]
    kept = oldest.read_bytes()
    oldest.write_bytes(b"")
    try:
        error = refused(pair, content[:-1])
    finally:
        oldest.write_bytes(kept)
    assert error.previous is None
    assert "no older intact one; to start afresh use a new path" in str(error)


def test_foreign_files(pair):
    file = io.BytesIO()
    np.savez(file, x=np.arange(3.0))
    for content in (
        file.getvalue(),
        b"",
        b"PK\x05\x06" + bytes(18),
        b"\x80\x04K\x01.",
        b"x" * 5000,
    ):
        assert "comes from something else" in str(refused(pair, content))


def test_links_folders_and_pipes_are_not_opened(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    first = checkpoint.save({"x": 1})
    newest = tmp_path / "run.00000002.npz"
    newest.symlink_to(first)
    with pytest.raises(CheckpointError, match="links are not followed"):
        checkpoint.load({"x": 0})
    newest.unlink()
    newest.mkdir()
    with pytest.raises(CheckpointError, match=r"00000002\.npz: it is"):
        checkpoint.load({"x": 0})
    newest.rmdir()
    os.mkfifo(newest)
    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoint.load({"x": 0})


def test_saving_replaces_a_link_and_leaves_its_target(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    checkpoint = Checkpoint(tmp_path / "run")
    (tmp_path / f".run.{os.getpid()}.tmp").symlink_to(target)
    checkpoint.save({"x": 1})
    assert checkpoint.load({"x": 0})[0] == {"x": 1}
    assert target.read_text() == "precious"


# Hostile files: they carry a correct signature


def forge(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.comment = module._signature("0" * 64)
        for name, data in members:
            archive.writestr(name, data)
    return sign(file.getvalue())


def sign(content, signature=None):
    body = content[: -len(module._signature("0" * 64))]
    digest = module._digest(io.BytesIO(body), len(body))
    return body + (signature or module._signature)(digest)


def npy(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


TEMPLATE = {"x": np.zeros(3)}


@pytest.fixture
def hostile(tmp_path):
    """Load TEMPLATE from given members, with the true manifest for True."""
    checkpoint = Checkpoint(tmp_path / "run")
    genuine = checkpoint.save({"x": np.arange(3.0)})
    with zipfile.ZipFile(genuine) as archive:
        manifest = archive.read("manifest.json")

    def load(members, **kwargs):
        filled = [(name, manifest if data is True else data) for name, data in members]
        genuine.write_bytes(forge(filled, **kwargs))
        return checkpoint.load(TEMPLATE)

    load.manifest = manifest  # pyright: ignore
    load.checkpoint = checkpoint  # pyright: ignore
    return load


def test_a_forged_copy_of_the_truth_loads(hostile):
    loaded, _ = hostile([("manifest.json", True), ("0.npy", npy(np.arange(3.0)))])
    np.testing.assert_array_equal(loaded["x"], np.arange(3.0))


class Trap:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["0.npy", "manifest.json"])
def test_pickles_are_not_run(hostile, tmp_path, name):
    made = tmp_path / "made by a pickle"
    trap = npy(np.array([Trap(made), None, None]), allow_pickle=True)
    members = {"manifest.json": True, "0.npy": npy(np.arange(3.0)), name: trap}
    with pytest.raises(CheckpointError):
        hostile(list(members.items()))
    assert not made.exists()
    np.load(io.BytesIO(trap), allow_pickle=True)
    assert made.exists()  # the trap works


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("manifest.json", True)],
        [("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", True), ("0.npy", npy(np.arange(3.0))), ("../evil", b"")],
        [("manifest.json", True), ("../0.npy", npy(np.arange(3.0)))],
        [("manifest.json", True), ("/0.npy", npy(np.arange(3.0)))],
        [("manifest.json", True), ("0.npy", b"")],
        [("manifest.json", True), ("0.npy", npy(np.arange(4.0)))],
        [("manifest.json", True), ("0.npy", npy(np.arange(3)))],
        [("manifest.json", True), ("0.npy", npy(np.arange(3.0))[:-1])],
        [("manifest.json", True), ("0.npy", npy(np.arange(3.0)) + b"\0")],
        [("manifest.json", b"[]"), ("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", b"{}"), ("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", b"\xff\xfe"), ("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", b"[" * 200_000), ("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", b'{"format": 1}'), ("0.npy", npy(np.arange(3.0)))],
        [("manifest.json", b'{"format": 1, "tree": 3, "numbers": []}'), ("0.npy", b"")],
        [("manifest.json", b'{"format": 1, "tree": [3], "numbers": []}'), ("0.npy", b"")],
        [("manifest.json", b'{"format": 1, "tree": [{}], "numbers": []}'), ("0.npy", b"")],
    ],
)
def test_hostile_contents_are_refused(hostile, members):
    with pytest.raises(CheckpointError):
        hostile(members)


@pytest.mark.parametrize("numbers", ["null", "[]", '["1", "2"]', "[1]", '["zz"]', '["__import__"]'])
def test_hostile_numbers_are_refused(tmp_path, numbers):
    checkpoint = Checkpoint(tmp_path / "run")
    file = checkpoint.save({"n": 1})
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["numbers"] = json.loads(numbers)
    file.write_bytes(forge([("manifest.json", json.dumps(manifest))]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load({"n": 0})


def test_bombs_cost_no_memory(hostile):
    huge = npy(np.zeros(3)).replace(b"(3,), }" + b" " * 6, b"(3000000000,), }"[:13])
    zeros = npy(np.zeros(10_000_000))
    bombs = [
        ([("manifest.json", True), ("0.npy", huge)], {}),
        ([("manifest.json", True), ("0.npy", zeros)], {"compression": zipfile.ZIP_DEFLATED}),
        ([("manifest.json", b" " * 80_000_000)], {"compression": zipfile.ZIP_DEFLATED}),
    ]
    contents = [
        forge([(n, hostile.manifest if d is True else d) for n, d in m], **k) for m, k in bombs
    ]
    # A central directory of 200,000 entries.
    table = b"PK\x01\x02" + bytes(24) + (60).to_bytes(2, "little") + bytes(16) + b"n" * 60
    size = 200_000 * len(table)
    end = b"PK\x05\x06" + bytes(4) + b"\xff\xff\xff\xff" + size.to_bytes(4, "little") + bytes(4)
    comment = module._signature("0" * 64)
    contents.append(sign(table * 200_000 + end + len(comment).to_bytes(2, "little") + comment))
    file = hostile.checkpoint.files()[-1]
    for content in contents:
        file.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError):
                hostile.checkpoint.load(TEMPLATE)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The declared limit on tables, twice, plus what Python and zipfile need to start.
        assert peak < 2 * module.LIMIT + 2**20


def test_newer_formats_are_refused(pair):
    def newer(digest):
        return f"tolerax-checkpoint format=0002 sha256={digest}".encode()

    error = refused(pair, sign(pair[2], newer))
    assert "written in format 2 by a newer version of Tolerax, this one reads up to 1" in str(error)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200)
def test_signed_garbage_is_refused_or_equal(pair, data):
    """Change bytes and sign again: what is loaded all the same is a state of the right shape."""
    checkpoint, newest, content = pair
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 130))
        damaged[position] = data.draw(st.integers(0, 255))
    newest.write_bytes(sign(bytes(damaged)))
    try:
        loaded, _ = checkpoint.load(make(memory=2))
    except CheckpointError:
        return
    finally:
        newest.write_bytes(content)
    # zipfile's own checksums protect arrays and manifest; only dates and such may have changed.
    assert bits(loaded) == bits(make(2.0, memory=2))


# A kill, or an error, at any system call


class Killed(BaseException):
    pass


class FaultyFile:
    def __init__(self, file, call):
        self.file, self.call = file, call

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        # Half of it may have been written.
        self.call(lambda: self.file.write(data), lambda: self.file.write(data[: len(data) // 2]))
        return len(data)

    def flush(self):
        self.call(self.file.flush)


class FaultyOs:
    """The module os, in which the n-th call raises; after a kill all later ones do too."""

    CALLS = ("open", "fsync", "replace", "unlink", "listdir", "close")

    def __init__(self, fatal_call, error):
        self.fatal_call = fatal_call
        self.error: Any = error
        self.calls = 0
        self.names = []

    def call(self, function, before=lambda: None):
        self.calls += 1
        self.names.append(getattr(getattr(function, "func", None), "__name__", "write"))
        dead = self.error is Killed and self.calls > self.fatal_call
        if dead or self.calls == self.fatal_call:
            if not dead:
                before()
            raise self.error
        return function()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real
        return lambda *args: self.call(functools.partial(real, *args))

    def fdopen(self, *args):
        return FaultyFile(os.fdopen(*args), self.call)


@pytest.mark.parametrize("error", [Killed, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fault_at_every_system_call(tmp_path, monkeypatch, caplog, error):
    template = {"x": jnp.zeros(5), "n": 0}
    state = [{"x": jnp.full(5, float(n)), "n": n} for n in range(5)]
    outcomes = collections.Counter()
    for fatal_call in range(1, 200):
        folder = tmp_path / str(fatal_call)
        folder.mkdir()
        checkpoint = Checkpoint(folder / "run", keep=2)
        for n in (1, 2):
            checkpoint.save(state[n])
        faulty = FaultyOs(fatal_call, error)
        outcome, message = "saved", ""
        with monkeypatch.context() as patched:
            patched.setattr(module, "os", faulty)
            try:
                checkpoint.save(state[3])
            except Killed:
                outcome = "killed"
            except CheckpointError as raised:
                outcome = "refused"
                message = str(raised)
        if faulty.calls < fatal_call:
            break
        # What a new process finds.
        after = Checkpoint(folder / "run", keep=2)
        loaded, _ = after.load(template)
        assert bits(loaded) in (bits(state[2]), bits(state[3]))
        is_new = loaded["n"] == 3
        outcomes[outcome, is_new] += 1
        if outcome == "saved":
            assert is_new
        before, _ = after.load(template, previous=True)
        assert bits(before) == bits(state[2 if is_new else 1])
        if outcome == "refused":
            assert "No space left" in message
        after.save(state[4])
        assert bits(after.load(template)[0]) == bits(state[4])
        assert len(after.files()) == 2
        assert not list(folder.glob(".*"))
    else:
        pytest.fail("saving never ended")
    if error is Killed:
        # Killed before the rename, and after it.
        assert set(outcomes) == {("killed", False), ("killed", True)}
    else:
        # After the rename the folder cannot be forced to disk (reported), or the old file cannot
        # be removed (logged).
        assert set(outcomes) == {("refused", False), ("refused", True), ("saved", True)}
        assert "old checkpoints cannot be removed" in caplog.text
    assert sum(outcomes.values()) > 15


def test_data_is_on_disk_before_its_name_and_the_name_before_old_files_go(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "run", keep=1)
    checkpoint.save({"x": 1})
    calls = FaultyOs(0, Killed)
    calls.error = None  # only record
    monkeypatch.setattr(module, "os", calls)
    checkpoint.save({"x": 2})
    names = [name for name in calls.names if name not in ("write", "listdir")]
    # The file; the rename; the folder; the old file.
    assert names == ["open", "fsync", "replace", "open", "fsync", "close", "unlink"]


def test_two_runs_on_one_path_do_not_mix(tmp_path, monkeypatch):
    """A second run clears what the first is writing: the first is told, both stay loadable."""
    checkpoint = Checkpoint(tmp_path / "run")
    real_write = module._write

    def write_while_another_saves(file, manifest, described):
        monkeypatch.setattr(module, "_write", real_write)
        real_write(file, manifest, described)
        monkeypatch.setattr(module.os, "getpid", lambda: 1)
        Checkpoint(tmp_path / "run").save({"x": 2})

    monkeypatch.setattr(module, "_write", write_while_another_saves)
    with pytest.raises(CheckpointError, match="no other run uses this path"):
        checkpoint.save({"x": 1})
    assert checkpoint.load({"x": 0})[0] == {"x": 2}


SAVER = """
import sys
import numpy as np
from tolerax.checkpoint import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
n = checkpoint.load({"n": 0, "x": np.zeros(5000)})[0]["n"] if checkpoint.exists() else 0
while True:
    n += 1
    checkpoint.save({"n": n, "x": np.full(5000, float(n))})
"""


def test_kill_9(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run")
    last = 0
    for delay in (0.03, 0.11, 0.2):
        newest = checkpoint.files()[-1:]
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path / "run")])
        try:
            deadline = time.monotonic() + 120
            while checkpoint.files()[-1:] == newest and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        loaded, _ = checkpoint.load({"n": 0, "x": np.zeros(5000)})
        assert loaded["n"] > last
        np.testing.assert_array_equal(loaded["x"], float(loaded["n"]))
        last = loaded["n"]


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
