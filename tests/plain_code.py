"""Machine code that compiles fast, for tests and for examples at small size: they compile much and
compute little."""

import os
import subprocess
import sys

PLAIN_CODE = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    # A program in one piece: to split it for several threads, and to link it, takes longer.
    "xla_cpu_parallel_codegen_split_count": "1",
}


def ask_for_plain_code() -> None:
    """Set XLA_FLAGS before the first compilation reads them, and for the processes started here.

    XLA ends the process at a flag it does not know, and flags go with its versions: they are tried
    in a process of their own, once for all workers, which inherit what is set here; each alone
    where they do not work together.
    """
    given = os.environ.get("XLA_FLAGS", "")
    asked = [f"--{name}={value}" for name, value in PLAIN_CODE.items() if name not in given]
    if not _known(f"{given} {' '.join(asked)}"):
        asked = [flag for flag in asked if _known(f"{given} {flag}")]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *asked])


def _known(flags: str) -> bool:
    """Whether a process starts XLA with these flags."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode
