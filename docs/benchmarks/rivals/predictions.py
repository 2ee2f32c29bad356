"""Case G: what `diagnose` says before training against what was measured after it.

    python docs/benchmarks/rivals/predictions.py

Nothing is trained here, and no diagnosis sees a network. The rises of the denoising loss are those of cases E and F;
verdicts are those of E and F, of the points of A and B, and of the gallery, as gallery.json has them. A verdict says
that the distance to the data will rise if the loss contradicts the data, needs a smaller weight, or cannot work. It is
right if the distance rises, or does not, as it says: on every seed, and in the gallery, which has one seed, by more
than 5 %. The last table has losses of the gallery that its data satisfy: whether `diagnose` says that shrinking lowers
them, and the standard deviation of the samples. Writes predictions.txt and predictions.json beside this script; rows
that predictions.json has are not diagnosed again, so delete it after a change of `diagnose`.
"""

import json
import statistics
import sys
from pathlib import Path

import circle
import pictures
import torch
from diffusers import DDPMScheduler
from methods import METHODS
from scipy.stats import spearmanr
from torch import Tensor

from reg_diffusers import Term, diagnose, judge
from reg_diffusers.regularizers import equality

HERE = Path(__file__).parent
RESULT = Path(__file__).with_suffix(".json")
sys.path.insert(0, str(HERE.parent))
import gallery_cases  # noqa: E402

PICTURES = ("letters", "clothes", "clothes_noise")
LAWS = ("divergence", "curl", "poisson", "heat", "conservation", "darcy", "unit_norm", "out_of_range")
GREATER = 1.05  # of the plain model's distance, for the single seed of the gallery


def main():
    said = json.loads(RESULT.read_text()).get("said", {}) if RESULT.exists() else {}
    rises, verdicts, results = [], [], HERE / "results"
    for name in PICTURES:
        ask_about_pictures(name, said)
        if (path := results / f"{name}.json").exists():
            case_rises, case_verdicts = of_pictures(name, json.loads(path.read_text())["rows"], said)
            rises, verdicts = rises + case_rises, verdicts + case_verdicts
    for name, angles in {"circle": circle.uniform, "weighted_circle": circle.weighted}.items():
        ask_about_points(name, angles, said)
        verdicts += of_points(name, json.loads((results / f"{name}.json").read_text())["rows"], said)
    verdicts += of_gallery(json.loads((HERE.parent / "gallery.json").read_text()))
    found = {"said": said, "rises": rises, "verdicts": verdicts, "shrinking": shrinking()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(lines(found)) + "\n"
    RESULT.with_suffix(".txt").write_text(text)
    print(text)


def keep(said: dict, title: str, diagnosis) -> None:
    """Writes what a diagnosis says of a row into the file at once, so that a run can be stopped and continued."""
    said[title] = {"verdict": judge(diagnosis).answer, "predicted": diagnosis.asked.rise}
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(known | {"said": said}, indent=1) + "\n")
    print(f"{title}: {said[title]['verdict']}", flush=True)


def titled(name: str, method: str, weight: float) -> str:
    return f"{name}, {method}, {weight:g}"


def expects_harm(answer: str) -> bool:
    """Whether a verdict says that the samples will be farther from the data."""
    return "contradicts" in answer or "smaller weight" in answer or "cannot work" in answer


class Remembered:
    """A regularizer whose values and gradients are kept: rows that differ in their weights ask for the same ones.

    Args:
        regularizer: L', of the image alone or with `original_samples`.
    """

    def __init__(self, regularizer):
        self._regularizer, self._known = regularizer, {}
        self.needs = getattr(regularizer, "needs", ())

    def __call__(self, x0_hat: Tensor, /, **context: Tensor) -> Tensor:
        place = x0_hat.detach().numpy().tobytes()
        if place not in self._known:
            image = x0_hat.detach().requires_grad_()
            with torch.enable_grad():
                values = self._regularizer(image, **context)
            self._known[place] = values.detach(), torch.autograd.grad(values.sum(), image)[0]
        values, gradient = self._known[place]
        return values + ((x0_hat - x0_hat.detach()) * gradient).flatten(1).sum(1)


def ask_about_pictures(name: str, said: dict) -> None:
    """Diagnoses the rows of a case that are not known yet."""
    case = pictures.CASES[name]
    rows = {titled(name, *pictures.named(row)): row for row in pictures.weighted(case)}
    if not (new := rows.keys() - said.keys()):
        return
    regularizer, schedule = Remembered(case.regularizer()), case.schedule()
    timesteps = pictures.times(schedule, (torch.arange(1000) + 0.5) / 1000)
    images = case.pictures().known[: case.diagnosed]
    for title, (weighting, weight) in rows.items():
        if title in new:
            term = Term(regularizer, weight, weighting, "loss")
            keep(said, title, diagnose(schedule, term, images, timesteps=timesteps))


def of_pictures(name: str, rows: list[dict], said: dict) -> tuple[list[dict], list[dict]]:
    plain, rises, verdicts = rows[0], [], []
    for row in rows:
        title = titled(name, row["method"], row["weight"])
        if title not in said:
            continue
        measured = [one / other - 1 for one, other in zip(row["denoising"], plain["denoising"], strict=True)]
        rises.append({"case": name, "row": title, "predicted": said[title]["predicted"], "measured": measured})
        changes = [one - other for one, other in zip(row["FD"], plain["FD"], strict=True)]
        verdicts.append(verdict(title, said[title]["verdict"], "FD", changes, min(changes) > 0))
    return rises, verdicts


def ask_about_points(name: str, angles, said: dict) -> None:
    scheduler = DDPMScheduler(circle.STEPS, trained_betas=circle.cosine_betas().numpy(), prediction_type="sample")
    angle = angles(torch.Generator().manual_seed(0))
    points = torch.stack([angle.cos(), angle.sin()], 1)[:4000, :, None, None]
    for method in METHODS:
        title = titled(name, method.name, method.weight)
        if method.kind == "ours" and method.weight and title not in said:
            term = Term(equality(circle.residual), method.weight, method.weighting, "residual")
            keep(said, title, diagnose(scheduler, term, points, snr_gamma=circle.GAMMA))


def of_points(name: str, rows: list[dict], said: dict) -> list[dict]:
    found = []
    for row in rows:
        title = titled(name, row["method"], row["weight"])
        if title in said:
            changes = [one - other for one, other in zip(row["distance"], rows[0]["distance"], strict=True)]
            found.append(verdict(title, said[title]["verdict"], "distance", changes, min(changes) > 0))
    return found


def of_gallery(known: dict[str, dict]) -> list[dict]:
    found = []
    for name, row in known.items():
        one, other = row["with"]["distance"], row["plain"]["distance"]
        title = titled("gallery", name, row["weight"])
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
    for title, warns in {"harm is expected": True, "no harm is expected": False}.items():
        rows = [row["right"] for row in found["verdicts"] if expects_harm(row["verdict"]) is warns]
        yield f"right where {title}: {sum(rows)} of {len(rows)}"
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
