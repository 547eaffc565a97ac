"""The guide runs: its Python blocks, page by page, print what the page says they print.

A block ```text right after a block ```python is what that prints. Words must agree; numbers may
differ as they do from one machine to another: see `close`.
"""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

GUIDE = Path(__file__).parents[1] / "docs/guide"
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")


def close(shown: str, seen: str) -> bool:
    """Errors and other numbers with an exponent to a factor of 30, counts from ten on to a third,
    decimals to 2 in 100 or half of the last digit shown; small counts exactly."""
    a, b = (float(number.replace(",", "")) for number in (shown, seen))
    if "e" in shown:
        return abs(b) <= 30 * max(abs(a), 1e-9) and abs(a) <= 30 * max(abs(b), 1e-9)
    if "." in shown:
        return abs(a - b) <= max(0.02 * abs(a), 0.6 * 10.0 ** -len(shown.split(".")[1]))
    return a == b or (abs(a) >= 10 and abs(a - b) <= abs(a) / 3)


def agree(shown: str, seen: str) -> bool:
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, seen)]
    numbers = [NUMBER.findall(text) for text in (shown, seen)]
    return words[0] == words[1] and all(map(close, *numbers))


@pytest.mark.parametrize("page", sorted(GUIDE.glob("*.md")), ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        # Line numbers in errors are those of the page.
        source = "\n" * line + match[1]
        out = io.StringIO()
        # Readers broadcast as they please.
        with contextlib.redirect_stdout(out), jax.numpy_rank_promotion("allow"):
            exec(compile(source, str(page), "exec"), namespace)
        shown, seen = match[2] or "", out.getvalue()
        assert agree(shown, seen), f"{page}:{line} prints\n{seen}\nbut the page shows\n{shown}"


@pytest.mark.parametrize(
    ("shown", "seen", "same"),
    [
        ("error 4.6e-06", "error 5.1e-06", True),
        ("error 4.6e-06", "error 4.6e-03", False),
        ("error 0.0e+00", "error 3.0e-16", True),
        ("1,234 products", "1,300 products", True),
        ("4 steps", "5 steps", False),
        ("loss 0.0972", "loss 0.0973", True),
        ("loss 0.0972", "loss 0.12", False),
        ("x = 1.00", "x = -1.00", False),
        ("Converged", "Stalled", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_what_counts_as_the_same(shown: str, seen: str, same: bool):
    assert agree(shown, seen) == same
