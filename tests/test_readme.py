"""The Python blocks of README.md run as they stand, each in a fresh namespace."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("source", BLOCKS, ids=lambda source: source.splitlines()[0][:40])
def test_block_runs_and_reaches_its_end(source: str):
    names = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), names)
    assert (names.get("solution") or names["result"]).success


def test_readme_shows_both_entry_points():
    assert any("tolerax.solve(" in block for block in BLOCKS)
    assert any("tolerax.minimize(" in block for block in BLOCKS)
