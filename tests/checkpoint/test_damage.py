"""Files that are damaged, foreign, or made to harm are refused by name."""

import io
import json
import os
import tracemalloc
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.checkpoint.states import bits, make
from tolerax import checkpoint as module
from tolerax.checkpoint import Checkpoint, CheckpointError

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
