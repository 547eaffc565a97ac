"""How often the default solver finds the minimum of shifted functions."""

import dataclasses

from benchmarks.cbo_functions import (
    Failing,
    Shifted,
    ShiftedAnyhow,
    ackley,
    rastrigin,
    sphere,
)
from benchmarks.cbo_peers import beside
from benchmarks.cbo_runs import Case, success, worst
from benchmarks.frame import Bar, Group, Measured, Settings
from tolerax import CBO

SHIFTS = (0.0, 1.0, 2.0)
WHOLE = 10**6  # steps of patience: use up the budget, which the figures fix
D10 = Case("rastrigin_d10", Shifted(rastrigin, 1.0), 10, CBO(particles=100, patience=WHOLE), 600)


def over_shifts(name: str, steps: int, settings: Settings) -> Measured:
    """The smallest rate over the shifts, Rastrigin with 20 unknowns and 100 particles."""
    return worst(
        {
            f"B = {b:g}": success(
                Case(
                    f"{name}, B = {b:g}",
                    Shifted(rastrigin, b),
                    20,
                    CBO(particles=100, patience=WHOLE),
                    steps,
                    each_quick=10,
                ),
                settings,
            )
            for b in SHIFTS
        }
    )  # fmt: skip


def measure_rastrigin(settings: Settings) -> dict[str, Measured]:
    notebook = Case(
        "rastrigin_d20_notebook",
        Shifted(rastrigin, 1.0),
        20,
        CBO(particles=40, patience=WHOLE),
        5000,
    )
    d20 = over_shifts("rastrigin_d20", 1000, settings)
    peers = beside(Shifted(rastrigin, 1.0), 20, 100_000, settings)
    return {
        "rastrigin_d10": success(D10, settings),
        "rastrigin_d20": Measured(d20.samples, d20.value, {**d20.detail, "peers": peers}),
        "rastrigin_d20_long": over_shifts("rastrigin_d20_long", 1500, settings),
        "rastrigin_d20_notebook": success(notebook, settings),
    }


def measure_ackley(settings: Settings) -> dict[str, Measured]:
    draw = Shifted(ackley, 1.0)
    d20 = Case("ackley_d20", draw, 20, CBO(particles=100, patience=WHOLE), 1000, below=1e-2)
    d100 = Case("ackley_d100", draw, 100, CBO(particles=100, patience=WHOLE), 3000, each_quick=4)
    return {"ackley_d20": success(d20, settings), "ackley_d100": success(d100, settings)}


def measure_d100(settings: Settings) -> dict[str, Measured]:
    case = Case(
        "rastrigin_d100", Shifted(rastrigin, 1.0), 100, CBO(particles=1000, patience=WHOLE), 10_000,
        each=2, each_quick=1,
    )  # fmt: skip
    return {"rastrigin_d100": success(case, settings)}


def measure_sphere(settings: Settings) -> dict[str, Measured]:
    """Nothing chosen but the start at 0: not particles, nor spread, nor where the run ends."""
    draw = ShiftedAnyhow(sphere)
    rates = {}
    for d in (2, 5, 10, 20, 50, 100):
        quick = 10 if d < 50 else 4
        case = Case(
            f"defaults_sphere, d = {d}", draw, d, CBO(), 20_000, each_quick=quick, ensemble=False
        )
        rates[f"d = {d}"] = success(case, settings)
    return {"defaults_sphere": worst(rates)}


def measure_nan(settings: Settings) -> dict[str, Measured]:
    """The same keys with and without failing values."""
    clean = success(D10, settings)
    failing = success(dataclasses.replace(D10, name="  10 % NaN", wrap=Failing), settings)
    lost = [a - b for a, b in zip(clean.samples, failing.samples, strict=True)]
    value = clean.figure - failing.figure
    detail = {"clean": dict(clean.detail), "failing": dict(failing.detail)}
    return {"nan_loss": Measured(lost, value=value, detail=detail)}


RASTRIGIN_GROUP = Group(
    "rastrigin",
    (
        Bar("rastrigin_d10", ">=", 0.95, "success, 100 particles x 600 steps"),
        Bar("rastrigin_d20", ">=", 0.80, "smallest over shifts B, 100 x 1000"),
        Bar("rastrigin_d20_long", ">=", 0.98, "smallest over shifts B, 100 x 1500"),
        Bar("rastrigin_d20_notebook", ">=", 0.99, "40 x 5000, as in the notebook of cbx"),
    ),
    measure_rastrigin,
)

ACKLEY_GROUP = Group(
    "ackley",
    (
        Bar("ackley_d20", ">=", 1.0, "success with f < 1e-2, 100 x 1000"),
        Bar("ackley_d100", ">=", 0.5, "success, 100 x 3000"),
    ),
    measure_ackley,
)

D100_GROUP = Group(
    "d100",
    (Bar("rastrigin_d100", ">=", 0.5, "success, 1000 x 10,000, ten runs"),),
    measure_d100,
)

SPHERE_GROUP = Group(
    "sphere",
    (Bar("defaults_sphere", ">=", 1.0, "smallest success over d = 2 ... 100, defaults only"),),
    measure_sphere,
)

NAN_GROUP = Group(
    "nan",
    (Bar("nan_loss", "<=", 0.02, "success lost where 10 % of the values are NaN"),),
    measure_nan,
)
