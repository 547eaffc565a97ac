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

    XLA ends the process at a flag it does not know, and flags go with its versions: each is tried
    in a process of its own, once for all workers, which inherit what is set here.
    """
    given = os.environ.get("XLA_FLAGS", "")
    asked = [f"--{name}={value}" for name, value in PLAIN_CODE.items() if name not in given]
    started = [(flag, _process_with(f"{given} {flag}")) for flag in asked]
    known = [flag for flag, process in started if process.wait() == 0]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *known])


def _process_with(flags: str) -> subprocess.Popen[bytes]:
    """A process that starts XLA with these flags."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
