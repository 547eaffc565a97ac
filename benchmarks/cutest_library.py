"""The problems of CUTEst in JAX."""

import sys
import types
from typing import Any


def library() -> Any:
    """The package sif2jax."""
    # One of its modules fills a large matrix entry by entry when it is imported.
    slow = "sif2jax.cutest._constrained_minimisation.cleuven7"
    stub: Any = types.ModuleType(slow)
    stub.CLEUVEN7 = type("CLEUVEN7", (), {})
    sys.modules.setdefault(slow, stub)
    import sif2jax

    return sif2jax
