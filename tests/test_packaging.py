"""What a user installs holds every module of the tree, and nothing else.

A build that follows links, or lists packages by hand, can leave modules out without a word;
so the wheel is built the way an index would (tree -> source distribution -> wheel) and compared.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("problems", "solvers")


def tree() -> set[str]:
    """Files of the package as they lie in the checkout, relative to it."""
    files = [*ROOT.glob("tolerax/**/*.py"), ROOT / "tolerax/py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    # No isolation: hatchling is part of the test extra, so nothing is downloaded here.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_source_distribution_holds_the_package_once(built: Path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {name for name in names if name.startswith("tolerax/")} == tree()
    assert not {name for name in names if name.split("/")[0] in LINKS}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_holds_the_package_and_nothing_else(built: Path):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == tree()


def test_every_module_of_the_wheel_imports_away_from_the_checkout(built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    script = (
        "import pkgutil, sys, tolerax\n"
        "for module in pkgutil.walk_packages(tolerax.__path__, 'tolerax.'):\n"
        "    __import__(module.name)\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items()\n"
        "                if n.partition('.')[0] == 'tolerax'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    imported = {Path(line).relative_to(site).as_posix() for line in done.stdout.split()}
    assert imported == {name for name in tree() if name.endswith(".py")}


@pytest.mark.parametrize("name", LINKS)
def test_link_at_the_top_shows_the_folder_of_the_package(name: str):
    link = ROOT / name
    # Without support for links, git writes the target into a plain file.
    target = os.readlink(link) if link.is_symlink() else link.read_text()
    assert target == f"tolerax/{name}"
