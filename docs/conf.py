"""Sphinx: MyST pages, a gallery run from examples/, and a reference read from the docstrings.

The built site needs no other host: no web fonts, and MathJax is copied from a package.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import markdown_docstrings  # noqa: E402, F401  (first: it sets how jaxtyping names its types)

import tolerax  # noqa: E402
from tests.plain_code import ask_for_plain_code  # noqa: E402

project = "Tolerax"
author = "The Tolerax developers"
copyright = author
version = release = tolerax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "generated_tables",
    "markdown_docstrings",
    "offline",
]
exclude_patterns = ["_build"]
suppress_warnings = [
    # sphinx-gallery registers functions in its configuration, which cannot be cached.
    "config.cache",
]

# Pages
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# Reference
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
# The methods of the contracts are described once, on the page of the contracts.
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Gallery. TOLERAX_EXAMPLE_SIZE=small makes the scripts themselves do less, and compile faster.
os.environ.setdefault("MPLBACKEND", "Agg")
if os.environ.get("TOLERAX_EXAMPLE_SIZE") == "small":
    ask_for_plain_code()
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "gallery_order.MainFirst",
    # Scripts at a time, in processes of their own: most of their time is compilation.
    "parallel": min(os.cpu_count() or 1, 4),
    "capture_repr": (),
    "image_srcset": ["2x"],
    "thumbnail_size": (480, 320),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
    "min_reported_time": float("inf"),
    "write_computation_times": False,
}

# Site
html_theme = "furo"
html_title = "Tolerax"
html_static_path = ["_static"]
html_css_files = ["tolerax.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
