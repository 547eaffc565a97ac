"""Every script of examples/ runs from beginning to end, at small size and without a screen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("plot_*.py"))


@pytest.mark.example
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script: Path, tmp_path: Path):
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "TOLERAX_EXAMPLE_SIZE": "small",
        # Compiled as users' code is, not as tests are: see plain_code.py.
        "XLA_FLAGS": "",
    }
    # Run elsewhere, so that a script that reads or leaves files in the checkout is noticed.
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.example
def test_there_are_examples():
    assert SCRIPTS
