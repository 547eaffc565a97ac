"""The reference names every public object once, and every one of them says what it does."""

import functools
import inspect
import re
import types
from pathlib import Path

import pytest

import tolerax
import tolerax.inner
import tolerax.problems
import tolerax.problems.library
import tolerax.solvers

ROOT = Path(__file__).parents[1]
PACKAGES = (
    tolerax,
    tolerax.problems,
    tolerax.problems.library,
    tolerax.solvers,
    tolerax.inner,
)


def public(package: types.ModuleType) -> dict[str, object]:
    """Classes and functions of ours that a package offers by name."""
    return {
        f"{package.__name__}.{name}": value
        for name, value in vars(package).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value) or hasattr(value, "__wrapped__"))
        and getattr(value, "__module__", "").startswith("tolerax")
    }


PUBLIC = {name: value for package in PACKAGES for name, value in public(package).items()}
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
DOCUMENTED = {
    name: functools.reduce(
        lambda owner, part: getattr(owner, part, None), name.split(".")[1:], tolerax
    )
    for name in re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)", REFERENCE, re.M)
}
EVERY = DOCUMENTED | PUBLIC


def test_reference_names_what_exists():
    assert not [name for name, value in DOCUMENTED.items() if value is None]


def test_reference_names_every_public_object_once():
    # Two packages may offer the same object (tolerax.Bilevel is tolerax.problems.Bilevel).
    pages = [id(value) for value in DOCUMENTED.values()]
    missing = [name for name, value in PUBLIC.items() if id(value) not in pages]
    assert not missing, "add to a page of docs/reference"
    assert len(pages) == len(set(pages))


@pytest.mark.parametrize("value", EVERY.values(), ids=EVERY)
def test_public_object_has_a_docstring(value: object):
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own
    assert own.strip()


@pytest.mark.parametrize("owner", [value for value in EVERY.values() if inspect.isclass(value)])
def test_public_methods_have_docstrings(owner: type):
    members = {
        member: getattr(owner, member)
        for base in owner.__mro__
        if base.__module__.startswith("tolerax")
        for member, value in vars(base).items()
        if not member.startswith("_") and (callable(value) or isinstance(value, property))
    }
    # getdoc finds the text of an overridden method, which is where it belongs.
    assert not [member for member, value in members.items() if not inspect.getdoc(value)]
