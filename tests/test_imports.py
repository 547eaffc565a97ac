"""Who may import whom, and what `import tolerax` may cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("tolerax", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if not {"_build", "gallery"} & set(path.parts)
)

# Contracts and inner solves at the bottom; problems and solvers stand on them and never on each
# other; the driver above; minimize on top. A folder may not import what is named here.
FORBIDDEN = {
    "tolerax/inner": ("tolerax.problems", "tolerax.solvers", "tolerax.driver", "tolerax.minimize"),
    "tolerax/problems": ("tolerax.solvers", "tolerax.driver", "tolerax.minimize"),
    "tolerax/solvers": ("tolerax.problems", "tolerax.driver", "tolerax.minimize"),
}

# Costly or optional: imported where they are used, so that the library loads with little more
# than jax and runs without its extras.
LAZY = (
    "dask",
    "dfols",
    "distributed",
    "matplotlib",
    "optax",
    "scipy.optimize",
    "skimage",
    "sklearn",
    "tqdm",
)


def imports(path: Path, source: str) -> Iterator[str]:
    """Absolute dotted names that a file's source imports, wherever in it the import stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def reaches(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def violations(path: Path, source: str) -> set[str]:
    # A bare `solvers` works by accident from the root of a checkout, as a second copy.
    banned = ("solvers", "problems")
    for folder, names in FORBIDDEN.items():
        if path.is_relative_to(ROOT / folder):
            banned += names
    return {name for name in imports(path, source) for module in banned if reaches(name, module)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    assert not violations(path, path.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("examples/plot_x.py", "from solvers import MAID"),
        ("tests/x.py", "import problems.bilevel"),
        ("tolerax/problems/x.py", "def f():\n    from ..solvers.newton import g"),
        ("tolerax/problems/library/x.py", "from ... import solvers"),
        ("tolerax/solvers/x.py", "import tolerax.problems as p"),
        ("tolerax/inner/x.py", "from tolerax.driver import solve"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str):
    assert violations(ROOT / path, source)


def test_import_leaves_optional_packages_alone():
    # Compared with what jax itself loads: that is not ours to change.
    script = (
        "import sys, jax\n"
        "before = set(sys.modules)\n"
        "import tolerax, tolerax.problems, tolerax.solvers\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(LAZY) & set(done.stdout.split())
