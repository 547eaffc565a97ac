"""The solvers that the conformance suite runs, and what each of them can do.

A new solver joins with one line in `SOLVERS`, or in `SEARCHES` if it is derivative-free and
searches from a point; every test then runs it as far as its abilities go.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tolerax import (
    CDSM,
    HOAG,
    MAID,
    DirectionalAttack,
    ExactAugmentedLagrangian,
    InexactLineSearch,
    InexactNewton,
    ModelTrustRegion,
    Solver,
    Status,
)

# What a gradient-based descent method reports, whatever it is built of.
DESCENT = frozenset(
    {
        "budget",
        "contradicted",
        "converged",
        "converged_estimated",
        "non_finite_start",
        "not_reproduced",
        "stalled",
        "stopped",
        "time",
        "unbounded",
    }
)
# Of those that tighten the tolerances themselves.
ADAPTIVE = DESCENT | {"accuracy_floor", "inner_failed"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One solver of the suite.

    - `make(**fields)`: the solver; `method`: its name in `minimize`.
    - `solves`: names of problems in `zoo.PROBLEMS` that it solves within `STEPS` answers.
    - `uses_gradient`, `honours_bounds`: as they say.
    - `statuses`: names of the statuses it can end with, each of which a test must reach.
    - `looks_twice`: whether it asks for the gradient where it has asked for the value before.
    - `names_wrong_gradients`: whether it tells a wrong gradient from a failed search.
    - `lower_after`: answers after which it has seen a value below that of the start.
    - `fields`: fields to set so that a status is reached within `STEPS` answers, by status.
    """

    name: str
    make: Callable[..., Solver]
    method: str | None = None
    solves: frozenset[str] = frozenset({"quadratic", "bounded", "half_bounded"})
    uses_gradient: bool = True
    honours_bounds: bool = True
    statuses: frozenset[str] = DESCENT
    looks_twice: bool = False
    names_wrong_gradients: bool = False
    fields: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    lower_after: int = 2

    def __str__(self) -> str:
        return self.name

    def to_reach(self, status: str) -> dict[str, Any]:
        """Fields of the solver with which the case of a status fits into `STEPS` answers."""
        return self.fields.get(status, {})

    def solver(self, dtype: Any = jnp.float64, **fields: Any) -> Solver:
        """The solver with its float fields as arrays, as `solve` passes them on: one compilation
        serves all tolerances."""

        def array(leaf: Any) -> Any:
            floating = isinstance(leaf, float) or jnp.issubdtype(
                jnp.result_type(leaf), jnp.floating
            )
            return jnp.asarray(leaf, dtype) if floating else leaf

        return jax.tree.map(array, self.make(**fields))


EASY = frozenset({"quadratic", "bounded", "half_bounded"})
ALL = EASY | {"rosenbrock", "bounded_rosenbrock"}

SOLVERS = (
    Entry(
        "line-search",
        InexactLineSearch,
        "line-search",
        solves=ALL,
        statuses=ADAPTIVE | {"gradient_inconsistent"},
        names_wrong_gradients=True,
    ),
    Entry(
        "steepest-descent",
        functools.partial(InexactLineSearch, memory=0),
        "steepest-descent",
        solves=EASY | {"bounded_rosenbrock"},
        statuses=ADAPTIVE | {"gradient_inconsistent"},
        names_wrong_gradients=True,
    ),
    Entry(
        "maid",
        MAID,
        "maid",
        statuses=ADAPTIVE | {"gradient_inconsistent"},
        names_wrong_gradients=True,
        looks_twice=True,
        fields={"stalled": {"max_rounds": 5}},
    ),
    Entry("hoag", HOAG, "hoag", statuses=DESCENT),
    Entry(
        "newton",
        InexactNewton,
        "newton",
        solves=ALL,
        # Differences of values give no Hessian, and nothing else here is an estimate.
        statuses=(ADAPTIVE - {"converged_estimated"}) | {"gradient_inconsistent"},
        names_wrong_gradients=True,
    ),
    Entry(
        "sqp",
        ExactAugmentedLagrangian,
        "sqp",
        solves=ALL,
        lower_after=3,
    ),
)

# One entry a class: for what depends on the code of a solver and not on its fields, and compiles.
FAMILIES = tuple({type(entry.make()): entry for entry in reversed(SOLVERS)}.values())


@dataclasses.dataclass(frozen=True)
class Search:
    """`make(**fields)`: the solver; `method`: its name in `minimize`; `close`: how near it comes
    to the minimum of a quadratic."""

    name: str
    make: Callable[..., Solver]
    method: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    close: float = 1e-5
    statuses: tuple[Any, ...] = (Status.converged_estimated,)

    def __str__(self) -> str:
        return self.name

    def solver(self, **fields: Any) -> Solver:
        return self.make(**{**self.fields, **fields})


SEARCHES = (
    Search("model-trust-region", ModelTrustRegion, "model-trust-region"),
    Search("cdsm", CDSM, "cdsm"),
    # Python code gives no derivatives.
    Search("attack", DirectionalAttack, "attack", {"samples": 2}),
)
