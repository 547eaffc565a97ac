"""Docstrings are Markdown like the rest of the documentation, but autodoc speaks reStructuredText.

Each docstring is handed to MyST through a small `myst` directive. Two things that read well in
source are not MyST and are translated first: doctests, and references written [`Name`][].
"""

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, new_document

REFERENCE = re.compile(r"\[`([^`\]]+)`\]\[([^\]]*)\]")


def translate(lines: list[str]) -> Iterator[str]:
    """MyST for a docstring: doctests become code blocks, [`Name`][] becomes a reference."""
    fence = ""
    for line in lines:
        if not fence and line.lstrip().startswith(">>> "):
            fence = " " * (len(line) - len(line.lstrip())) + "```"
            yield fence + "pycon"
        elif fence and not line.strip():
            yield fence
            fence = ""
        # A leading dot looks the name up in all modules, so that `Query` is enough.
        yield line if fence else REFERENCE.sub(_role, line)
    if fence:
        yield fence


def _role(match: re.Match[str]) -> str:
    name, target = match[1], match[2] or match[1]
    return f"{{py:obj}}`{name} <{target if '.' in target else '.' + target}>`"


class Myst(SphinxDirective):
    """Parse the content as Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        source = self.content.source(0) or "" if self.content else ""
        document = new_document(source, self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def wrap(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if any(line.strip() for line in lines):
        lines[:] = [".. myst::", "", *("   " + line for line in translate(lines)), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("myst", Myst)
    app.connect("autodoc-process-docstring", wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
