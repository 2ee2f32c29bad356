"""What `diagnose` answers to wishes and their opposites, on two data sets, and the effects that its threshold parts.

    cd docs/benchmarks && python opposites.py

Asks about both wishes of each pair in wishes.py at three weights, without a model, on the embedded pictures (16 x 16)
and on scikit-learn's digits (8 x 8). Writes the table beside this script. Takes some minutes; needs scikit-learn.
"""

from pathlib import Path

import torch
from diffusers import DDPMScheduler
from wishes import PAIRS

from reg_diffusers import Term, diagnose, judge
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.diagnosis.verdict import SMALLEST_EFFECT
from reg_diffusers.settings import DataSettings

WEIGHTS = (0.05, 0.1, 0.5)
IMAGES = 1000
LEVELS = 6


def main():
    text = "\n".join(
        table(name, images[:IMAGES]) for name, images in {"embedded": embedded(), "digits": digits()}.items()
    )
    Path(__file__).with_suffix(".txt").write_text(text)
    print(text)


def embedded():
    data = load_training_data(DataSettings(resolution=16))
    return data.normalization.normalize(data.examples.__getitems__(list(range(IMAGES)))["values"])


def digits():
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1


def table(name, images):
    lines = [f"{name}: {len(images)} images, effect on leftover noise, answers at weights {WEIGHTS}", ""]
    lines.append(f"{'wish':<32}{'removed':>9}{'moved':>9}{'net':>9}  answers")
    both = 0
    for pair, wishes in PAIRS.items():
        answers = []
        for wish, label in zip(wishes, (pair, "  the opposite"), strict=True):
            effect, said = asked(wish, images)
            answers.append(said)
            shown = " | ".join(dict.fromkeys(said))
            lines.append(f"{label:<32}{effect.removed:>9.3%}{effect.moved:>9.3%}{effect.net:>+9.3%}  {shown}")
        both += sum(all(answer.startswith("makes sense") for answer in said) for said in zip(*answers, strict=True))
    lines += [
        "",
        f"both make sense: {both} of {len(PAIRS) * len(WEIGHTS)}; least net effect {SMALLEST_EFFECT:.0%}",
        "",
    ]
    return "\n".join(lines)


def asked(wish, images):
    """The effect of a wish, which no weight changes, and the answer at each weight."""
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    found = [diagnose(scheduler, Term(wish, weight), images, num_levels=LEVELS) for weight in WEIGHTS]
    return found[0].data.effect, [judge(diagnosis).answer for diagnosis in found]


if __name__ == "__main__":
    main()
