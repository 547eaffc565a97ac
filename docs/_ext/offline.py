"""Fail a build whose pages would ask another host for a script, a style, a font or a picture."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ASSET = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b(?![^>]*rel=["'](?:canonical|license))[^>]*\shref=["']?(?:https?:)?//[^>]*>"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//[^;]*"""
    r"""|url\(["']?(?:https?:)?//[^)]*\)"""
)


def check(app: Sphinx, failure: Exception | None) -> None:
    if failure is not None or app.builder.format != "html":
        return
    files = [path for kind in ("*.html", "*.css") for path in Path(app.outdir).rglob(kind)]
    found = [
        f"{path.relative_to(app.outdir)}: {match[0]}"
        for path in files
        for match in ASSET.finditer(path.read_text(errors="replace"))
    ]
    if found:
        raise ExtensionError("the site needs another host:\n  " + "\n  ".join(found))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
