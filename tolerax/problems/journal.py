"""A journal: a file to which every value is appended as it comes, so that a kill loses none.

One line a record: eight hexadecimal digits of its CRC-32, a space, an object in JSON. The first
record says what the journal is about. Nothing in a file is ever executed.
"""

import contextlib
import json
import logging
import os
import stat
import weakref
import zlib
from pathlib import Path
from typing import Any

from tolerax.errors import JournalError
from tolerax.fingerprint import qualified_name

FORMAT = 1
LONGEST = 2**26  # bytes of a line: what a hostile file can make its reader allocate

logger = logging.getLogger("tolerax")


class Journal:
    """Opens or makes the journal at `path`; `records` holds what it has, in the order of writing.

    - `identity`: what it is about, by content; a journal about something else is refused.
    - `about`: the same for people.

    Only one run writes at a time. A last line that was torn by a kill is removed; damage anywhere
    else is refused with `JournalError`.
    """

    def __init__(self, path: str | os.PathLike[str], identity: str, about: Any):
        self.path = Path(path).expanduser()
        self.head = {
            "tolerax_journal": FORMAT,
            "identity": identity,
            "about": qualified_name(about),
        }
        self.records: list[dict[str, Any]] = []
        self._end: int | None = None
        self._file: int | None = None  # a descriptor
        self._closing: weakref.finalize | None = None
        self._open()

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when this returns the system has it, and a kill of this process does not
        lose it."""
        file = self._open()
        line = encoded(record)
        if len(line) > LONGEST:
            raise JournalError(
                f"{self.path}: a record of {len(line)} bytes is too long for a journal."
            )
        self._write(file, line)

    def sync(self) -> None:
        """Force what was appended to disk, so that a failing machine does not lose it either."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._closing is not None:
            self.sync()
            self._closing()
            self._file = self._closing = None

    # -- the file ---------------------------------------------------------------------------------

    def _open(self) -> int:
        if self._file is not None:
            return self._file
        if self.path.is_symlink():
            raise JournalError(f"{self.path} is a link, and links are not followed: give its goal.")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, name, 0)
        try:
            file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise JournalError(
                f"{self.path}: the journal cannot be opened ({error}): its folder must exist and "
                "be writable."
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise JournalError(f"{self.path} is not a regular file: give another path.")
            _lock(file, self.path)
            if self._end is None:
                self._read(file)
            elif os.fstat(file).st_size != self._end:
                raise JournalError(
                    f"{self.path}: the journal has changed since this run wrote to it: one journal "
                    "belongs to one run at a time."
                )
        except BaseException:
            os.close(file)
            raise
        self._file, self._closing = file, weakref.finalize(self, os.close, file)
        return file

    def _write(self, file: int, line: bytes) -> None:
        assert self._end is not None
        try:
            if os.write(file, line) != len(line):
                raise OSError("the disk took only a part of the record")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, self._end)
            raise JournalError(f"{self.path}: the journal cannot be written ({error}).") from error
        self._end += len(line)

    def _read(self, file: int) -> None:
        """Read all records, and cut off a torn last one."""
        good = 0
        torn: bytes | None = None
        with open(file, "rb", closefd=False) as lines:
            while line := lines.readline(LONGEST + 1):
                record = decoded(line)
                if torn is not None:
                    raise JournalError(
                        f"{self.path}: the journal is damaged at byte {good}: restore it, or begin "
                        "a new one under another path."
                    )
                if record is None and good == 0 and line != encoded(self.head)[: len(line)]:
                    raise JournalError(f"{self.path} is not a journal: give another path.")
                if record is None:
                    torn = line
                    continue
                if good == 0:
                    self._check_head(record)
                else:
                    self.records.append(record)
                good += len(line)
        self._end = good
        if torn is not None:
            logger.warning("%s: the last line was torn and is dropped.", self.path)
            os.ftruncate(file, good)
        if good == 0:
            self._write(file, encoded(self.head))

    def _check_head(self, head: dict[str, Any]) -> None:
        version = head.get("tolerax_journal")
        if not isinstance(version, int):
            raise JournalError(f"{self.path} is not a journal: give another path.")
        if version > FORMAT:
            raise JournalError(
                f"{self.path}: written in format {version} by a newer version of Tolerax, this one "
                f"reads up to {FORMAT}: upgrade."
            )
        if head.get("identity") != self.head["identity"]:
            raise JournalError(
                f"{self.path}: the journal holds values of another function or problem "
                f"({str(head.get('about'))[:200]}; the function, what it captures, its gradient or "
                "its bounds have changed): give another path."
            )


def encoded(record: dict[str, Any]) -> bytes:
    """A record as a line."""
    content = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(content), content)


def decoded(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or `None` if it is none that was written by `encoded`."""
    if len(line) < 10 or line[8:9] != b" " or not line.endswith(b"\n"):
        return None
    content = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(content):
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _lock(file: int, path: Path) -> None:
    """Keep other runs out for as long as the file is open; a kill lets go of it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JournalError(
            f"{path}: another run is writing to this journal: wait for its end, or give another "
            "path."
        ) from error
    except OSError:  # some network file systems cannot
        return
