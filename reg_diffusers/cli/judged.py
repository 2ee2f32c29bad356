"""Measures the samples of models against the data, a few images at a time, for `evaluate` and `sweep`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from ..runtime.messages import bars_are_hidden, say
from .bench import Bench
from .judging import PREDICTED

__all__ = ["Judged", "judge_models"]

_IMAGES_OF_LOSS = 256
_BATCH_SIZE = 64
_SEARCHED_AT_A_TIME = 2**22  # numbers: small blocks cost seven times the time, because each reads all queries


@dataclass
class Judged:
    """The result of `judge_models`.

    Attributes:
        rows: the rows of the table by title, the data first.
        copies: near copies, by title.
        features: the features that images were compared by.
    """

    rows: dict
    copies: dict
    features: object

    @property
    def compared(self) -> int:
        """The number of images of each set that numbers about pairs of images use."""
        return len(self.copies["data"].distances)

    @property
    def note(self) -> str:
        """States which numbers are about a part of the images, and the error that this adds; "" if none is."""
        number = self.rows["data"].images
        return _note(self.compared, number) if self.compared < number else ""


def judge_models(
    args: argparse.Namespace,
    models: dict,
    samples: dict,
    bench: Bench,
    features,
    regularizers: dict,
    device,
    *,
    with_denoising_loss: bool = False,
) -> Judged:
    """Measures the data and all models; call it in the main process only."""
    import dataclasses

    from ..evaluation.distances import Estimate
    from ..evaluation.judgement import judge_samples
    from ..evaluation.measuring import denoising_losses

    number, titles = bench.number, list(samples)
    of_samples = {name: term for name, term in regularizers.items() if not bench.lacking(term)}
    halves = [dataclasses.replace(half, device=device) for half in (bench.reference, bench.other)]
    drawn = {title: dataclasses.replace(images, device=device) for title, images in samples.items()}
    vectors = {}
    if features.frechet:
        vectors["data"] = _vectors(features, bench.images, range(bench.searched), device, "data")
        vectors |= {title: _vectors(features, samples[title].read, range(number), device, title) for title in titles}
    copies = _copies(features, samples, bench, vectors, device)

    def row(title: str, images, conditions: dict, first: int, loss: float | None = None):
        pair = None
        if features.frechet:
            pair = (vectors[title][first : first + number], vectors["data"][:number])
        return judge_samples(
            images,
            halves[0],
            of_samples,
            features=features,
            vectors=pair,
            copies=copies[title],
            denoising_loss=loss,
            **conditions,
        )

    rows = {"data": row("data", halves[1], bench.other_conditions, number)}
    for title in titles:
        loss = None
        if with_denoising_loss:
            pipeline = models[title]
            some = _conditions(pipeline, bench, device)
            some |= {name: getattr(args, name) for name in ("snr_gamma", "loss_weighting", "timestep_sampling")}
            encoded = pipeline.encode(halves[0][:_IMAGES_OF_LOSS])
            losses = denoising_losses(pipeline.as_in_loss(), pipeline.scheduler, encoded, args.seed, **some)
            loss = losses.mean().item()
        rows[title] = row(title, drawn[title], bench.conditions, 0, loss)
    if predicted := {name: term for name, term in regularizers.items() if name not in of_samples}:
        for title, terms in _of_predictions(predicted, models, titles, bench, device, args.seed).items():
            measured = {**rows[title].terms, **terms}
            terms = {f"{name}{PREDICTED * (name in predicted)}": measured[name] for name in regularizers}
            rows[title] = dataclasses.replace(rows[title], terms=terms)
    if args.fid:
        from ..evaluation.inception import inception_distance

        for title, images in {"data": halves[1], **drawn}.items():
            fid = Estimate(inception_distance(images, halves[0]), float("nan"), float("nan"))
            rows[title] = dataclasses.replace(rows[title], distances={**rows[title].distances, "Inception FID": fid})
    return Judged(rows, copies, features)


def _conditions(pipeline, bench: Bench, device) -> dict:
    """Returns the conditions of a model for the first reference images, by name."""
    found = {name: value[:_IMAGES_OF_LOSS].to(device) for name, value in bench.conditions.items()}
    return found | (pipeline.embeddings(bench.texts[:_IMAGES_OF_LOSS]) if pipeline.takes_prompts else {})


def _of_predictions(terms: dict, models: dict, titles: list[str], bench: Bench, device, seed: int) -> dict:
    """Measures L' of x0_hat on the first reference images, and of these images themselves, by title and name."""
    import dataclasses

    from accelerate.utils import send_to_device

    from ..evaluation.distances import mean_of
    from ..evaluation.measuring import losses_of_predictions
    from ..term import score

    number = min(bench.number, _IMAGES_OF_LOSS)
    images, belonging = bench.reference[:number].to(device), send_to_device(bench.belonging(number), device)
    given = {**{name: value[:number].to(device) for name, value in bench.conditions.items()}, **belonging}
    needed = {name: {need: given[need] for need in term.needs} for name, term in terms.items()}
    found = {"data": {name: mean_of(score(term, images, needed[name])) for name, term in terms.items()}}
    for title in titles:
        pipeline, found[title] = models[title], {}
        network, encoded, conditions = (
            pipeline.as_in_loss(),
            pipeline.encode(images),
            _conditions(pipeline, bench, device),
        )
        for name, term in terms.items():
            context = {need: value for need, value in needed[name].items() if need != "original_samples"}
            if pipeline.vqvae is not None:
                term = dataclasses.replace(term, view=pipeline._view)
                context |= {"original_images": images} if "original_samples" in needed[name] else {}
            of_each = losses_of_predictions(term, network, pipeline.scheduler, encoded, seed, context, **conditions)
            found[title][name] = mean_of(of_each)
    return found


def _note(compared: int, number: int) -> str:
    return (
        "near copies, kernel distance, precision, recall, density and coverage use the first"
        f" {compared:,} of {number:,} images: their intervals are about {math.sqrt(number / compared):.1f} times"
        " as wide as those of all images would be"
    )


def _copies(features, samples: dict, bench: Bench, vectors: dict, device) -> dict:
    """Searches the data, in one pass, for the images nearest to the first samples of each model and to the data."""
    import torch

    from ..evaluation.distances import PAIRED, nearest, paired
    from ..evaluation.judgement import copies_of

    width = features.extract(bench.images(range(1)).to(device)).shape[1]
    compared, most = paired(bench.number, width), 2 * paired(PAIRED, width)
    if compared < bench.number:
        say(f"pairs       {_note(compared, bench.number)}")
    start = max(bench.number - most // 2, 0)
    own = range(start, min(start + most, bench.searched))  # of the data: holds the first images of the other half
    reads = {"data": (bench.images, own)}
    reads |= {title: (images.read, range(compared)) for title, images in samples.items()}
    if vectors:
        queries = [vectors[title][places.start : places.stop] for title, (_, places) in reads.items()]
        searched = [vectors["data"]]
    else:
        queries = [_vectors(features, read, places, device, title) for title, (read, places) in reads.items()]
        size = max(_SEARCHED_AT_A_TIME // width, _BATCH_SIZE)
        searched = _blocks(features, bench.images, range(bench.searched), device, "data, searched", size)
    itself = torch.cat([torch.tensor(own), torch.full((compared * len(samples),), -1)]).to(device)
    distances, indices = nearest(torch.cat(queries), searched, itself)
    of_data, *parts = distances.split([len(own), *[compared] * len(samples)])
    other = slice(bench.number - start, bench.number - start + compared)
    found = {"data": copies_of(of_data[other], indices[other], of_data)}
    for title, part, near in zip(samples, parts, indices[len(own) :].split(compared), strict=True):
        found[title] = copies_of(part, near, of_data)
    return found


def _vectors(features, read, places: range, device, title: str):
    """Computes the features of the images at some places, (n, D)."""
    import torch

    return torch.cat(list(_blocks(features, read, places, device, title)))


def _blocks(features, read, places: range, device, title: str, batch_size: int = _BATCH_SIZE):
    """Yields the same a few images at a time."""
    import torch
    from tqdm import tqdm

    batches = tqdm(
        range(places.start, places.stop, batch_size),
        desc=f"features of {title}",
        unit="batch",
        dynamic_ncols=True,
        leave=False,
        disable=bars_are_hidden(),
    )
    for start in batches:
        with torch.no_grad():
            yield features.extract(read(range(start, min(start + batch_size, places.stop))).to(device))
