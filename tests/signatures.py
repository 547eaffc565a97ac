"""The package as the tests see it: each public signature is checked when it is called, by beartype.

Those are functions of modules, methods, and what makes an object of a class, in all modules. Not
what is private: a name that begins with an underscore, and a function inside of another one, which
is new in each call, so that to check it means to compile code for its signature once more. Their
checks took up to a third of the time of a test, and what they are given has been checked before.
"""

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

NAME = "__checked__"
TOLD = BeartypeConf(violation_type=TypeCheckError)  # a TypeError, as users would have


def check_signatures(package: str) -> None:
    """Check the signatures of a package that is imported from now on."""
    assert package not in sys.modules, f"{package} is imported already, with no signature checked"
    sys.meta_path.insert(0, Finder(package))


class Finder(MetaPathFinder):
    """Finds the modules of a package as Python does, and has them loaded with checks."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not from __pycache__: there lies the code without checks.
        path = self.get_filename(fullname)
        return self.source_to_code(Decorated().visit(ast.parse(self.get_data(path))), path)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, NAME, checked)
        super().exec_module(module)


def checked(what: Any) -> Any:
    """A function that checks its signature, or a class that checks what makes its objects.

    As `jaxtyped(typechecker=beartype)` does, which binds and checks the arguments twice to tell in
    its own words which one is wrong: beartype tells that too, and tests make a million such calls.
    """
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__)
        return what
    checks = beartype(conf=TOLD)(what)

    @functools.wraps(what)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Names of axes stand for the same sizes within one call.
        with jaxtyped("context"):
            return checks(*args, **kwargs)

    return wrapper


class Decorated(ast.NodeTransformer):
    """Puts the check next to what it checks: below the other decorators of a function, which may
    change what it takes, and above those of a class, which may give it its `__init__`."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if _public(node) and _annotated(node):
            node.decorator_list.append(_check_at(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        if not _public(node):
            return node
        node.decorator_list.insert(0, _check_at(node))
        return self.generic_visit(node)


def _public(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return not node.name.startswith("_") or node.name.endswith("__")


def _annotated(node: ast.FunctionDef) -> bool:
    arguments = (part for part in ast.walk(node.args) if isinstance(part, ast.arg))
    return node.returns is not None or any(argument.annotation for argument in arguments)


def _check_at(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Name(NAME, ast.Load()), node)
