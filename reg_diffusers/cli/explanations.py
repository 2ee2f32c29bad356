"""Explains each number in the table of an evaluation in one sentence."""

from __future__ import annotations

from .judging import PREDICTED

__all__ = ["explanations"]


def explanations(rows: dict, bench) -> list[tuple[str, str]]:
    """Returns pairs of a number's name and its explanation."""
    from ..evaluation.measuring import LEAST_SNR, SLICED

    some = next(iter(rows.values()))
    named = {
        SLICED: "distance between the pixel distributions along random directions, in pixel values from -1 to 1; it is"
        " more sensitive to brightness and contrast than to shapes.",
        "precision": "share of samples that lie among the data; low if samples are bad. A ! marks a recall near 0,"
        " where the precision means nothing.",
        "recall": "share of the data that lies among the samples; low if variety is missing.",
        "density": "mean number of images of the data near a sample, relative to the data themselves, which have 1.",
        "coverage": "share of the data that has a sample nearby; low if variety is missing.",
        "Inception FID": "the standard Frechet inception distance; compare it only for the same number of images.",
    }
    on_samples = "the loss L' on finished samples, before they are clipped to [-1, 1]."
    on_predictions = (
        "the loss L' on x0_hat, because samples lack what it needs: images of the data with what belongs to them,"
        f" each at 4 noise levels of an SNR of at least {LEAST_SNR:g}, the same for every model. In the column of the"
        " data, L' of the images themselves; a perfect model does not reach it exactly, because x0_hat is a mean of"
        " images. Images that a model was trained on may flatter it."
    )
    explained = [(name, on_predictions if name.endswith(PREDICTED) else on_samples) for name in some.terms]
    for name in some.distances:
        if name in named:
            explained.append((name, named[name]))
        elif name.startswith("KD") or name.endswith("KD"):
            explained.append(
                (name, "kernel distance of the same features; unbiased: 0 on average for a perfect model.")
            )
        else:
            explained.append(
                (
                    name,
                    f"Frechet distance of the features. It falls with the number of images (here {bench.number:,} in"
                    " every column): compare it only for the same number of images and the same features.",
                )
            )
    explained.append(
        (
            "near copies",
            "share of samples at least as close to an image of the data as the closest 5 % of the data are to each"
            " other; about 5 % for the data, more if they have duplicates. The search covers"
            f" {bench.searched:,} of {len(bench.order):,} images.",
        )
    )
    return explained
