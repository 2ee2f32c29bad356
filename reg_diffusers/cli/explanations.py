"""Explains each number in the table of an evaluation in one sentence."""

from __future__ import annotations

__all__ = ["explanations"]


def explanations(rows: dict, bench) -> list[tuple[str, str]]:
    """Returns pairs of a number's name and its explanation."""
    from ..evaluation.measuring import SLICED

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
    explained = [(name, "the loss L' on finished samples, before they are clipped to [-1, 1].") for name in some.terms]
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
