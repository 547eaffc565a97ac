"""Reference solutions that are computed once and kept in the user's cache folder."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tolerax.fingerprint import fingerprint
from tolerax.validation import is_concrete

logger = logging.getLogger("tolerax")


def cache_folder() -> Path:
    """Where data are kept: `TOLERAX_CACHE` if it is set, else the folder `tolerax` in the cache
    folder of the system (`XDG_CACHE_HOME` or `~/.cache`; `~/Library/Caches`; `LOCALAPPDATA`)."""
    chosen = os.environ.get("TOLERAX_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tolerax"


def kept(name: str, given: Any, compute: Callable[[], Array]) -> Array:
    """What `compute()` returns, from the cache folder if it was computed before from the same.

    - `name`: of the data and the version of the code that makes them. - `given`: everything that
      they depend on; its content names the file.

    A file that cannot be read is made again, and one that cannot be written is done without.
    """
    if not is_concrete(given):
        raise ValueError(
            "cache=True needs numbers to name a file by, and this is within a transformation such "
            "as jit or grad: call it outside, or with cache=False."
        )
    file = cache_folder() / f"{name}-{fingerprint(given)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return jnp.asarray(np.load(file, allow_pickle=False))
    found = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed: a file with this name is complete.
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.save(part, np.asarray(found), allow_pickle=False)
        Path(part.name).replace(file)
    except OSError as error:
        logger.warning("%s is not kept: %s", file.name, error)
    return found
