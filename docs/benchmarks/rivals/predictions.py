"""Case G: what `diagnose` says before training against what was measured after it.

    python docs/benchmarks/rivals/predictions.py

Nothing is trained here. The rises of the denoising loss are those of cases E and F; verdicts are those of E and F, of
the points of A and B, and of the gallery. A verdict says that the distance to the data will rise if the loss
contradicts the data, needs a smaller weight, or cannot work. It is right if the distance rises, or does not, as it
says: on every seed, and in the gallery, which has one seed, by more than 5 %. The last table has losses of the gallery
that its data satisfy: whether `diagnose` says that shrinking lowers them, and the standard deviation of the samples.
Writes predictions.txt and predictions.json beside this script.
"""

import json
import statistics
import sys
from pathlib import Path

import circle
import torch
from diffusers import DDPMScheduler
from methods import METHODS
from scipy.stats import spearmanr

from reg_diffusers import Term, diagnose, judge
from reg_diffusers.regularizers import equality

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import gallery_cases  # noqa: E402

PICTURES = ("letters", "clothes", "clothes_noise")
LAWS = ("divergence", "curl", "poisson", "heat", "conservation", "darcy", "unit_norm", "out_of_range")
GREATER = 1.05  # of the plain model's distance, for the single seed of the gallery


def main():
    rises, verdicts = [], []
    for name in PICTURES:
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            case_rises, case_verdicts = of_pictures(name, json.loads(path.read_text())["rows"])
            rises, verdicts = rises + case_rises, verdicts + case_verdicts
    for name, angles in {"circle": circle.uniform, "weighted_circle": circle.weighted}.items():
        verdicts += of_points(name, angles, json.loads((HERE / "results" / f"{name}.json").read_text())["rows"])
    verdicts += of_gallery(json.loads((HERE.parent / "gallery.json").read_text()))
    found = {"rises": rises, "verdicts": verdicts, "shrinking": shrinking()}
    (HERE / "predictions.json").write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(lines(found)) + "\n"
    (HERE / "predictions.txt").write_text(text)
    print(text)


def expects_harm(answer: str) -> bool:
    """Whether a verdict says that the samples will be farther from the data."""
    return "contradicts" in answer or "smaller weight" in answer or "cannot work" in answer


def of_pictures(name: str, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    plain, rises, verdicts = rows[0], [], []
    for row in rows:
        if "verdict" not in row:
            continue
        title = f"{name}, {row['method']}, {row['weight']:g}"
        measured = [one / other - 1 for one, other in zip(row["denoising"], plain["denoising"], strict=True)]
        rises.append({"case": name, "row": title, "predicted": row["predicted rise"], "measured": measured})
        changes = [one - other for one, other in zip(row["FD"], plain["FD"], strict=True)]
        verdicts.append(verdict(title, row["verdict"], "FD", changes, min(changes) > 0))
    return rises, verdicts


def of_points(name: str, angles, rows: list[dict]) -> list[dict]:
    scheduler = DDPMScheduler(circle.STEPS, trained_betas=circle.cosine_betas().numpy(), prediction_type="sample")
    angle = angles(torch.Generator().manual_seed(0))
    points = torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None]
    known, found = {(row["method"], row["weight"]): row for row in rows}, []
    for method in METHODS:
        row = known.get((method.name, method.weight))
        if row is None or method.kind != "ours" or not method.weight:
            continue
        term = Term(equality(circle.residual), method.weight, method.weighting, "residual")
        answer = judge(diagnose(scheduler, term, points[:4000], snr_gamma=circle.GAMMA)).answer
        changes = [one - other for one, other in zip(row["distance"], rows[0]["distance"], strict=True)]
        title = f"{name}, {method.name}, {method.weight:g}"
        found.append(verdict(title, answer, "distance", changes, min(changes) > 0))
    return found


def of_gallery(known: dict[str, dict]) -> list[dict]:
    found = []
    for name, row in known.items():
        one, other = row["with"]["distance"], row["plain"]["distance"]
        title = f"gallery, {name}, {row['weight']:g}"
        found.append(verdict(title, row["verdict"], "distance", [one - other], one > GREATER * other))
    return found


def verdict(title: str, answer: str, measure: str, changes: list[float], harmed: bool) -> dict:
    right = expects_harm(answer) == harmed
    return {"row": title, "verdict": answer, "measure": measure, "changes": changes, "harmed": harmed, "right": right}


def shrinking() -> list[dict]:
    known, found = json.loads((HERE.parent / "gallery.json").read_text()), []
    for name in LAWS:
        case = gallery_cases.CASES[name]
        data = getattr(gallery_cases, case.data)()
        term = Term(case.make(data, None, None), case.weight, case.gate, name, view=data.units)
        scheduler = DDPMScheduler(prediction_type=case.prediction, clip_sample=False)
        reasons = judge(diagnose(scheduler, term, data.samples[:200], num_levels=2)).reasons
        spreads = {title: known[name][title]["standard_deviation"] for title in ("data", "plain", "with")}
        found.append({"row": name, "named": any("shrinking" in reason for reason in reasons)} | spreads)
    return found


def lines(found: dict):
    yield f"{'rise of the denoising loss':44}{'predicted':>12}{'measured':>22}"
    for row in found["rises"]:
        yield f"{row['row']:44}{row['predicted']:>12.2%}{percent(row['measured']):>22}"
    for name in (*PICTURES, None):
        rows = [row for row in found["rises"] if name in (row["case"], None)]
        if len(rows) > 2:
            pairs = [row["predicted"] for row in rows], [statistics.mean(row["measured"]) for row in rows]
            yield f"rank correlation, {name or 'all'}: {spearmanr(*pairs).statistic:.2f} over {len(rows)} pairs"
    yield f"\n{'verdict':44}{'change of the distance':>24}  {'rises':7}{'right':7}said"
    for row in found["verdicts"]:
        change = f"{spread(row['changes'])} ({row['measure']})"
        harmed, right = ("yes" if row[key] else "no" for key in ("harmed", "right"))
        yield f"{row['row']:44}{change:>24}  {harmed:7}{right:7}{row['verdict']}"
    for group in (*PICTURES, "circle", "weighted_circle", "gallery"):
        rows = [row["right"] for row in found["verdicts"] if row["row"].startswith(f"{group},")]
        if rows:
            yield f"right, {group}: {sum(rows)} of {len(rows)}"
    yield f"\n{'lowered by shrinking':44}{'named':>8}{'plain':>9}{'with':>9}{'data':>9}   standard deviation"
    for row in found["shrinking"]:
        spreads = "".join(f"{row[title]:>9.3f}" for title in ("plain", "with", "data"))
        yield f"{row['row']:44}{'yes' if row['named'] else 'no':>8}{spreads}"


def percent(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{deviation}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
