"""Our losses beside published ones, on problems whose answer is known: how far the constraint holds, and at what cost.

    python docs/benchmarks/rivals                          # all cases, three seeds
    python docs/benchmarks/rivals --cases weighted_circle --epochs 101
    python docs/benchmarks/rivals --quick                  # seconds per case: whether everything runs

Cases that have a file in --output are not run again. Each writes NAME.json there; the tables, rivals.txt, and the
picture, docs/images/rivals.png, are made from these files. The rivals are this project's implementations
(reg_diffusers.recipes), not their authors' code.
"""

import argparse
import json
from pathlib import Path

import circle
import report
import torch
from methods import METHODS

from reg_diffusers.runtime.hardware import keep_freed_memory

HERE = Path(__file__).parent
CASES = {"circle": circle.uniform, "weighted_circle": circle.weighted}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=401, help="passes over the 10,000 points; 401 in PIDM's script")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="names of rows, such as plain; default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one epoch; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    methods = [method for method in METHODS if args.methods is None or method.name in args.methods]
    if args.quick:
        for name in args.cases:
            print(report.table(name, circle.run(CASES[name], methods, args.seeds, epochs=1)))
        return
    args.output.mkdir(exist_ok=True)
    for name in args.cases:
        path = args.output / f"{name}.json"
        if not path.exists():
            found = circle.run(CASES[name], methods, args.seeds, epochs=args.epochs)
            path.write_text(json.dumps(found, indent=1) + "\n")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(args.output.glob("*.json"))}
    report.write(found, HERE / "rivals.txt", HERE.parents[1] / "images" / "rivals.png")


if __name__ == "__main__":
    main()
