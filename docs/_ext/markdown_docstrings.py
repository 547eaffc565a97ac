"""Docstrings are Markdown like the rest of the documentation; autodoc speaks reStructuredText.

Each docstring is handed to MyST through a small `myst` directive. Two things that read well in
source are not MyST and are translated first: doctests, and references written [`Name`][].
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
from docutils import nodes
from jaxtyping import ArrayLike, PRNGKeyArray
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, new_document
from sphinx.util.typing import stringify_annotation

# jaxtyping builds its names from this one, which jax fills with the module it happens to lie in.
jax.Array.__name__ = "Array"
ALIASES = {
    stringify_annotation(alias, "smart"): name
    for name, alias in {"ArrayLike": ArrayLike, "PRNGKeyArray": PRNGKeyArray}.items()
}
REFERENCE = re.compile(r"\[`([^`\]]+)`\]\[([^\]]*)\]")
# Names of classes become links by themselves where there is something to link to.
CLASS = re.compile(r"(?<![`\w}])`([A-Z]\w*[a-z]\w*)`(?!`)")


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
        yield line if fence else CLASS.sub(_role, REFERENCE.sub(_role, line))
    if fence:
        yield fence


def _role(match: re.Match[str]) -> str:
    name, *target = match.groups()
    target = "".join(target) or name
    # A leading dot looks the name up in all modules, so that `Query` is enough.
    return f"{{py:obj}}`{name} <{target if '.' in target else '.' + target}>`"


def page(app: Sphinx, docname: str, content: list[str]) -> None:
    """The same references in the pages."""
    if app.env.doc2path(docname).suffix == ".md":
        content[0] = REFERENCE.sub(_role, content[0])


class Myst(SphinxDirective):
    """Parse the content as Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        source = self.content.source(0) or "" if self.content else ""
        document = new_document(source, self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def members(enumeration: Any) -> list[str]:
    """The items of an Equinox enumeration with their messages."""
    items = enumeration._name_to_item.items()
    return ["", *(f"- `{name}`: {enumeration[item]}" for name, item in items)]


def wrap(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if hasattr(obj, "_name_to_item"):
        lines += members(obj)
    if any(line.strip() for line in lines):
        lines[:] = [".. myst::", "", *("   " + line for line in translate(lines)), ""]


def shorten(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Names of types as they stand in the source, not what they stand for."""

    def short(text: str) -> str:
        for long, alias in ALIASES.items():
            text = text and text.replace(long, alias)
        return text and text.replace("jaxtyping.", "")

    return short(signature), short(returns)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("myst", Myst)
    app.connect("source-read", page)
    app.connect("autodoc-process-docstring", wrap)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
