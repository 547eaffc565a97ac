"""`python -m benchmarks NAME [--quick] [--json] [--seeds 0 1 2] [--only GROUP ...] [--save]`."""

import argparse
import importlib
import sys

import jax

from benchmarks import frame

# The one place to add a benchmark: its name and the module that lists its GROUPS.
BENCHMARKS = {
    "bilevel": "benchmarks.bilevel",
    "cbo": "benchmarks.cbo",
    "moe": "benchmarks.moe",
    "cutest": "benchmarks.cutest",
    "pde": "benchmarks.pde",
    "dfo": "benchmarks.dfo",
    "attack": "benchmarks.attack",
    "gpu": "benchmarks.gpu",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure one benchmark and print its figures; the last line is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="fewer seeds, at most 5 minutes")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to report on")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="measure these groups only")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    options = parser.parse_args(arguments)

    jax.config.update("jax_enable_x64", True)
    groups = importlib.import_module(BENCHMARKS[options.name]).GROUPS
    if options.only:
        known = {group.name for group in groups}
        if unknown := sorted(set(options.only) - known):
            parser.error(f"--only: no group {', '.join(unknown)}; there are {sorted(known)}")
        groups = [group for group in groups if group.name in options.only]
    seeds = options.seeds or ((0,) if options.quick else (0, 1, 2, 3, 4))
    settings = frame.Settings(quick=options.quick, seeds=tuple(seeds))
    result = frame.run(groups, settings)
    if options.save:
        settings.tell(f"saved {frame.save(options.name, result)}")
    if not options.json:
        print(frame.table(groups, result))
    print(frame.last_line(result))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
