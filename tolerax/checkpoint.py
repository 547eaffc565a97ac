"""Checkpoints: a run saved to one file at a time, so that a kill at any moment loses nothing.

A checkpoint is an uncompressed npz file. `manifest.json` in it says what each array is (path,
dtype, shape), what the static structure was and who wrote it; the comment at the end of the file
carries the format version and the SHA-256 of everything before it. Nothing in a file is ever
executed: there is no pickle, and the structure comes from the template that the reader gives.

Each save makes a new file `NAME.00000001.npz`, `NAME.00000002.npz`, ...: it is written beside its
place under another name, forced to disk, and renamed. Hence every file with such a name is
complete, and there is no second file that could disagree with it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import platform
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from tolerax._described import Described, difference
from tolerax.fingerprint import fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
# The manifest, and the table of contents of the archive, are at most this long: what a hostile
# file can make its reader allocate beyond the arrays that the template asks for.
LIMIT = 16 * 2**20
MAX_ARRAYS = 100_000
CHUNK = 2**20

logger = logging.getLogger("tolerax")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or must not be loaded; the message says why and what to do.

    `file` is the file it is about, `previous` an older intact one (or `None`).
    """

    def __init__(self, message: str, file: Path | None = None, previous: Path | None = None):
        super().__init__(message)
        self.file = file
        self.previous = previous


class _DamagedError(Exception):
    """The reason why a file is not a checkpoint that was written by `save`."""


@dataclasses.dataclass
class Checkpoint:
    """Where, and how often, a run is saved.

    - `path`: folder and name; files are called `path.00000001.npz` and so on. The folder must
      exist. One path belongs to one run.
    - `every_seconds`, `every_steps`: the driver saves when either has passed.
    - `keep`: how many files are kept, at least 1.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> folder = tempfile.TemporaryDirectory()
    >>> checkpoint = Checkpoint(folder.name + "/digits")
    >>> state = {"x": jnp.array([1.0, 2.0]), "step": 3}
    >>> checkpoint.save(state, {"solver": "MAID"}).name
    'digits.00000001.npz'
    >>> loaded, manifest = checkpoint.load({"x": jnp.zeros(2), "step": 0})
    >>> loaded
    {'step': 3, 'x': Array([1., 2.], dtype=float64)}
    >>> checkpoint.load({"x": jnp.zeros(5), "step": 0})
    Traceback (most recent call last):
    ...
    tolerax.checkpoint.CheckpointError: ...digits.00000001.npz: the checkpoint has ['x']: float64 of
    shape (2,), this run needs float64 of shape (5,): use the same problem, solver and options, or a
    new path.
    >>> folder.cleanup()
    """

    path: str | os.PathLike[str]
    every_seconds: float = 30.0
    every_steps: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if not self.every_seconds > 0:
            raise ValueError(f"every_seconds must be positive, got {self.every_seconds}.")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps must be at least 1 or None, got {self.every_steps}.")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}.")
        path = Path(self.path).expanduser()
        name = path.name.removesuffix(".npz")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", name):
            raise ValueError(
                f"checkpoint path {os.fspath(self.path)!r} must end in a plain file name: letters, "
                "digits and _.+=- only, not beginning with a dot."
            )
        self.path = path.with_name(name)

    def files(self) -> list[Path]:
        """The files of this checkpoint, oldest first."""
        path = Path(self.path)
        pattern = re.compile(re.escape(path.name) + r"\.([0-9]{8,})\.npz")
        try:
            names = os.listdir(path.parent)
        except FileNotFoundError:
            return []
        numbered = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
        return [path.with_name(name) for _, name in sorted(numbered)]

    def exists(self) -> bool:
        """Whether there is a file to load, intact or not."""
        return bool(self.files())

    def save(self, tree: PyTree, manifest_extra: Mapping[str, Any] | None = None) -> Path:
        """Save `tree` in a new file, forced to disk when this returns, and drop old ones.

        - `tree`: leaves are JAX and NumPy arrays, typed random keys, Python numbers, or anything
          static (functions, strings), of which only a fingerprint is kept.
        - `manifest_extra`: more entries for the manifest, of JSON types.

        Raises `CheckpointError` when the folder is missing, cannot be written or is full: files
        saved before are then untouched.
        """
        path = Path(self.path)
        described = Described(tree)
        manifest = _manifest(described, dict(manifest_extra or {}))
        if not path.parent.is_dir():
            raise CheckpointError(
                f"{path}: the folder {path.parent} does not exist: create it first, or give "
                "another path.",
                path,
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            files = self.files()
            number = 1 + (_number(files[-1]) if files else 0)
            target = path.with_name(f"{path.name}.{number:08d}.npz")
            self._remove_unfinished()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _flag("O_CLOEXEC") | _flag("O_BINARY")
            with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
                _write(file, manifest, described)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise CheckpointError(
                f"{path}: a checkpoint cannot be written ({error}). Check that the folder can be "
                "written and has space, and that no other run uses this path; older checkpoints "
                "are untouched.",
                path,
            ) from error
        self._remove_old()
        return target

    def load(
        self, template: PyTree, expect: Mapping[str, Any] | None = None, previous: int = 0
    ) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint as `(tree, manifest)`, every bit as it was saved.

        - `template`: a pytree of the structure, dtypes and shapes that the run needs, for instance
          its first state. Static leaves, and the kind and sharding of arrays, are taken from it.
        - `expect`: entries that the manifest must have with these values.
        - `previous`: how many files to go back from the newest; `True` means 1.

        Raises `CheckpointError` if there is none, if it was damaged or not made by `save`, or if it
        belongs to something else: never loads another file than the one asked for.
        """
        described = Described(template)
        return self._reading(previous, lambda file: _read(file, described, dict(expect or {})))

    def manifest(self) -> dict[str, Any]:
        """What the newest checkpoint says of itself; raises as `load` does, but for what it belongs
        to."""
        return self._reading(0, lambda file: _read(file, None, {}))[1]

    def _reading(
        self, previous: int, read: Callable[[Path], tuple[PyTree, dict[str, Any]]]
    ) -> tuple[PyTree, dict[str, Any]]:
        files = self.files()
        back = int(previous)
        if not 0 <= back < len(files):
            which = f" {back} before the newest" if back else ""
            raise CheckpointError(
                f"{self.path}: there is no checkpoint{which} ({len(files)} files found).",
                Path(self.path),
            )
        file = files[-1 - back]
        try:
            return read(file)
        except _DamagedError as error:
            older = files[: -1 - back]
            intact = next((old for old in reversed(older) if _is_intact(old)), None)
            if intact is None:
                offer = "There is no older intact one; to start afresh use a new path."
            else:
                steps = len(files) - 1 - files.index(intact)
                offer = (
                    f"An older one is intact, {intact.name}: move newer files away, or call "
                    f"load(..., previous={steps}), to continue from it."
                )
            raise CheckpointError(f"{file}: {error}. {offer}", file, intact) from error

    def _remove_old(self) -> None:
        try:
            for old in self.files()[: -self.keep]:
                os.unlink(old)
        except OSError as error:  # the new checkpoint is safe all the same
            logger.warning("%s: old checkpoints cannot be removed (%s).", self.path, error)

    def _remove_unfinished(self) -> None:
        """Remove what killed runs left behind."""
        path = Path(self.path)
        pattern = re.compile(r"\." + re.escape(path.name) + r"\.[0-9]+\.tmp")
        for name in os.listdir(path.parent):
            if pattern.fullmatch(name):
                os.unlink(path.with_name(name))


# Writing


def _manifest(described: Described, extra: dict[str, Any]) -> bytes:
    versions = {name: metadata.version(name) for name in ("jax", "equinox", "numpy")}
    versions["tolerax"] = getattr(sys.modules.get("tolerax"), "__version__", "unknown")
    versions["python"] = platform.python_version()
    own = {"format": FORMAT, "versions": versions}
    content = {"tree": described.entries, "numbers": described.numbers}
    if reserved := (own.keys() | content.keys()) & extra.keys():
        raise ValueError(f"manifest_extra may not have the entry {min(reserved)!r}: rename it.")
    manifest = json.dumps(own | extra | content, default=_to_json, indent=1).encode()
    if len(manifest) > LIMIT or len(described.arrays) > MAX_ARRAYS:
        raise ValueError(
            f"the tree has {len(described.entries)} parts and {len(described.arrays)} arrays, too "
            "many for a checkpoint: stack small arrays into larger ones."
        )
    return manifest


def _to_json(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        return value.tolist()
    raise TypeError(f"manifest_extra holds {value!r}, which is not of a JSON type.")


def _write(file: Any, manifest: bytes, described: Described) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = _signature("0" * 64)
        archive.writestr(_member(MANIFEST), manifest)
        for index, leaf in enumerate(described.arrays):
            array = leaf.to_host()
            large = array.nbytes > 2**30
            with archive.open(_member(f"{index}.npy"), "w", force_zip64=large) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
    end = file.seek(0, os.SEEK_END) - len(_signature("0" * 64))
    digest = _digest(file, end)
    file.seek(end)
    file.write(_signature(digest))


def _member(name: str) -> zipfile.ZipInfo:
    # A fixed date: equal states make equal files.
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _signature(digest: str) -> bytes:
    return f"tolerax-checkpoint format={FORMAT:04d} sha256={digest}".encode()


def _digest(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where the system knows how."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY | _flag("O_DIRECTORY") | _flag("O_CLOEXEC"))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _flag(name: str) -> int:
    return getattr(os, name, 0)


def _number(file: Path) -> int:
    return int(file.name.split(".")[-2])


# Reading


def _read(
    file: Path, described: Described | None, expect: dict[str, Any]
) -> tuple[PyTree, dict[str, Any]]:
    """What is in a file; the manifest alone where no tree is described."""
    try:
        with _open(file) as stream:
            _check_signature(file, stream)
            with zipfile.ZipFile(_Limited(stream)) as archive:  # pyright: ignore
                manifest = _read_manifest(archive)
                if described is None:
                    return None, manifest
                _check_fit(file, manifest, described, expect)
                names = [f"{index}.npy" for index in range(len(described.arrays))]
                if archive.namelist() != [MANIFEST, *names]:
                    raise _DamagedError("it holds other arrays than its manifest says")
                arrays = [
                    _read_array(archive, name, leaf.stored_shape, leaf.stored_dtype)
                    for name, leaf in zip(names, described.arrays, strict=True)
                ]
                numbers = described.parsed(manifest["numbers"])
    except (_DamagedError, CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise _DamagedError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return described.restored(arrays, numbers), manifest


def _is_intact(file: Path) -> bool:
    try:
        with _open(file) as stream:
            _check_signature(file, stream)
    except (_DamagedError, CheckpointError, OSError):
        return False
    return True


def _open(file: Path) -> Any:
    if file.is_symlink():
        raise _DamagedError("it is a link, and links are not followed")
    # Not blocking: opening a pipe would wait for its writer.
    flags = _flag("O_NOFOLLOW") | _flag("O_NONBLOCK") | _flag("O_CLOEXEC") | _flag("O_BINARY")
    descriptor = os.open(file, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _DamagedError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _check_signature(file: Path, stream: Any) -> None:
    length = len(_signature("0" * 64))
    size = os.fstat(stream.fileno()).st_size
    stream.seek(max(size - length, 0))
    pattern = rb"tolerax-checkpoint format=([0-9]{4}) sha256=([0-9a-f]{64})"
    match = re.fullmatch(pattern, stream.read(length))
    if match is None:
        raise _DamagedError(
            "it does not end with the signature of a checkpoint: it is truncated or comes from "
            "something else"
        )
    if int(match[1]) > FORMAT:
        raise CheckpointError(
            f"{file}: written in format {int(match[1])} by a newer version of Tolerax, this one "
            f"reads up to {FORMAT}: upgrade, or use a new path.",
            file,
        )
    if int(match[1]) < 1 or _digest(stream, size - length) != match[2].decode():
        raise _DamagedError("its content does not agree with its SHA-256: it is damaged")


class _Limited:
    """A file for `zipfile` that refuses large single reads."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(min(size, LIMIT + 1) if size >= 0 else LIMIT + 1)
        if len(data) > LIMIT:
            raise _DamagedError(f"one of its tables is longer than {LIMIT} bytes")
        return data


def _open_member(archive: zipfile.ZipFile, name: str) -> Any:
    # Only what is stored as it is: a small file then cannot unpack into a large one.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _DamagedError(f"{name} in it is compressed")
    return archive.open(name)


def _read_manifest(archive: zipfile.ZipFile) -> dict[str, Any]:
    with _open_member(archive, MANIFEST) as member:
        text = member.read(LIMIT + 1)
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _DamagedError("its manifest is not one")
    return manifest


def _check_fit(
    file: Path, manifest: dict[str, Any], described: Described, expect: dict[str, Any]
) -> None:
    reason = difference(manifest["tree"], described.entries)
    wanted = json.loads(json.dumps(expect, default=_to_json))
    for name, value in wanted.items():
        if reason is None and manifest.get(name) != value:
            reason = f"the checkpoint has {name} {manifest.get(name)!r}, this run has {value!r}"
    if reason is not None:
        raise CheckpointError(
            f"{file}: {reason}: use the same problem, solver and options, or a new path.", file
        )


def _read_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    with _open_member(archive, name) as member:
        version = np.lib.format.read_magic(member)
        # The header is compared before anything of its size is allocated.
        header = np.lib.format.read_array_header_1_0(member) if version == (1, 0) else None
        if header != (shape, False, dtype):
            raise _DamagedError(f"{name} in it is not the array that its manifest says")
        array = np.empty(shape, dtype)
        missing = array.reshape(-1).view(np.uint8)
        while missing.size:
            chunk = np.frombuffer(member.read(min(CHUNK, missing.size)), np.uint8)
            if not chunk.size:
                raise _DamagedError(f"{name} in it is too short")
            missing[: chunk.size] = chunk
            missing = missing[chunk.size :]
        if member.read(1):
            raise _DamagedError(f"{name} in it is too long")
    return array


__all__ = ["Checkpoint", "CheckpointError", "fingerprint"]
