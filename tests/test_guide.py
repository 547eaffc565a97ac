"""The guide runs: its Python blocks, page by page, print what the page says they print.

A block ```text right after a block ```python is what that prints. Words must agree; numbers may
differ as they do from one machine to another: see `close`. Each page runs in a process of its own,
as a reader would run it, but for machine code that compiles fast: what a page shows must not hang
on the compiler.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plain_code import PLAIN_CODE

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/guide").glob("*.md"))
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")
RUNNER = """
import contextlib, io, json, sys, warnings
page, blocks = json.load(sys.stdin)
warnings.simplefilter("error")
# As for the tests, see pyproject.toml: several pages may compile the same at the same time.
warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
namespace, printed = {"__name__": "__main__"}, []
for line, source in blocks:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # Line numbers in errors are those of the page.
        exec(compile("\\n" * line + source, page, "exec"), namespace)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def close(shown: str, seen: str) -> bool:
    """Errors and other numbers with an exponent to a factor of 30, counts to a half or to three,
    decimals to 2 in 100 or half of the last digit shown."""
    a, b = (float(number.replace(",", "")) for number in (shown, seen))
    if "e" in shown:
        return abs(b) <= 30 * max(abs(a), 1e-9) and abs(a) <= 30 * max(abs(b), 1e-9)
    if "." in shown:
        return abs(a - b) <= max(0.02 * abs(a), 0.6 * 10.0 ** -len(shown.split(".")[1]))
    return abs(a - b) <= max(3, abs(a) / 2)


def agree(shown: str, seen: str) -> bool:
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, seen)]
    numbers = [NUMBER.findall(text) for text in (shown, seen)]
    return words[0] == words[1] and all(map(close, *numbers))


def plain() -> str:
    """What the tests have asked XLA for, without their eight devices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in flags if any(name in flag for name in PLAIN_CODE))


@pytest.mark.example
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path):
    text = page.read_text()
    matches = list(BLOCK.finditer(text))
    blocks = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in matches]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([str(page), blocks]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": plain()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for match, (line, _), seen in zip(matches, blocks, json.loads(done.stdout), strict=True):
        shown = match[2] or ""
        assert agree(shown, seen), f"{page}:{line} prints\n{seen}\nbut the page shows\n{shown}"


@pytest.mark.parametrize(
    ("shown", "seen", "same"),
    [
        ("error 4.6e-06", "error 5.1e-06", True),
        ("error 4.6e-06", "error 4.6e-03", False),
        ("error 0.0e+00", "error 3.0e-16", True),
        ("1,234 products", "1,300 products", True),
        ("4 steps", "9 steps", False),
        ("loss 0.0972", "loss 0.0973", True),
        ("loss 0.0972", "loss 0.12", False),
        ("x = 1.00", "x = -1.00", False),
        ("Converged", "Stalled", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_what_counts_as_the_same(shown: str, seen: str, same: bool):
    assert agree(shown, seen) == same
