"""What the tests check of the package's signatures, on a package of a few lines."""

import importlib
import sys

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import tolerax
from tests.signatures import check_signatures

SOURCE = """
from __future__ import annotations
import dataclasses
from jaxtyping import Array, Float

@dataclasses.dataclass
class Public:
    size: int
    def method(self, x: Float[Array, " n"]) -> Float[Array, " n n"]:
        return x
    def _method(self, x: int) -> int:
        return x

class _Private:
    def method(self, x: int) -> int:
        return x

def public(x: Float[Array, " n"], y: Float[Array, " n"]) -> None:
    def inner(x: int) -> int:
        return x
    return inner("no number") and None
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "few_lines.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    check_signatures("few_lines")
    yield importlib.import_module("few_lines")
    del sys.modules["few_lines"]


def test_arguments_shapes_results_and_fields_are_checked(package):
    x = jnp.ones(2)
    assert package.public(x, x) is None
    for call in (
        lambda: package.public(x, jnp.ones(3)),
        lambda: package.public(x, jnp.ones(2, int)),
        lambda: package.Public("two"),
        lambda: package.Public(2).method(x),
    ):
        with pytest.raises(TypeCheckError):
            call()


def test_private_signatures_are_not(package):
    assert package.Public(2)._method("one") == "one"
    assert package._Private().method("one") == "one"


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError, match="max_steps"):
        tolerax.solve(tolerax.Objective(jnp.sum), tolerax.CBO(), jnp.ones(2), max_steps="many")
