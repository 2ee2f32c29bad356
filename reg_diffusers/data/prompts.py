"""The texts of a data set and their embeddings, computed once and mapped into memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __version__
from ..runtime.messages import bars_are_hidden
from .stored_rows import stored_rows

__all__ = ["Prompts", "PromptsOnDemand"]

_AT_A_TIME = 8


class Prompts:
    """One text per image, with its embedding; equal texts share one.

    Args:
        texts: the text of each image.
        embed: n texts -> tensors (n, ...) by name.
        null: the embedding of no text, by the same names and in the same shapes, (1, ...).
        key: a hash of everything that affects `embed` and `null`.
        cache_dir: the folder that keeps the embeddings for the next run.

    Attributes:
        texts: as given.
        note: what to add to their number in a description.
        null: the embedding of no text, (1, ...) by name, as in the file.
        fingerprint: identifies the text of each image and what embeds it.
    """

    note = ""

    def __init__(
        self,
        texts: list[str],
        embed: Callable[[list[str]], Mapping[str, Tensor]],
        null: Mapping[str, Tensor],
        key: str,
        cache_dir: Path,
    ):
        self.texts = texts
        self.fingerprint = _fingerprint(texts, key)
        self._shapes = {name: value.shape[1:] for name, value in null.items()}
        distinct = list(dict.fromkeys(texts))
        name = hashlib.sha256(repr((distinct, self._shapes, key, __version__)).encode()).hexdigest()
        self._rows = stored_rows(
            cache_dir / f"prompts-{name}.npy",
            1 + len(distinct),
            lambda done: map(self._flat, _pieces(distinct, embed, null, done)),
        )
        place = {text: number for number, text in enumerate(distinct, start=1)}
        self._places = np.array([place[text] for text in texts])
        self.null = self._named(self._rows[:1])

    def of_images(self, rows: range) -> Prompts:
        """Returns the embeddings of the texts of some images, which get the indices from 0; the texts remain all."""
        part = copy.copy(self)
        part._places = self._places[rows.start : rows.stop]
        return part

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Reads the embeddings of the texts of these images, (B, ...) by name."""
        return self._named(self._rows[self._places[indices]])

    def _flat(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([embeddings[name].flatten(1) for name in self._shapes], dim=1)

    def _named(self, rows: np.ndarray) -> dict[str, Tensor]:
        parts = torch.from_numpy(np.array(rows)).split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


class PromptsOnDemand:
    """The texts of a stream of images, embedded batch by batch.

    Args:
        texts: the texts of the first images.
        embed: n texts -> tensors (n, ...) by name.
        null: the embedding of no text, by the same names and in the same shapes, (1, ...).
        key: a hash of everything that affects `embed` and `null`.

    Attributes:
        texts, embed: as given.
        note: what to add to their number in a description.
        null: the embedding of no text, (1, ...) by name, on the CPU.
        fingerprint: identifies these texts and what embeds all texts.
    """

    def __init__(
        self,
        texts: list[str],
        embed: Callable[[list[str]], Mapping[str, Tensor]],
        null: Mapping[str, Tensor],
        key: str,
    ):
        self.texts, self.embed = texts, embed
        self.note = f" among the first {len(texts):,} images; embedded in each step"
        self.null = {name: value.cpu() for name, value in null.items()}
        self.fingerprint = _fingerprint(texts, key)


def _fingerprint(texts: list[str], key: str) -> str:
    return hashlib.sha256(repr((texts, key)).encode()).hexdigest()


def _pieces(
    texts: list[str], embed: Callable[[list[str]], Mapping[str, Tensor]], null: Mapping[str, Tensor], done: int
) -> Iterator[Mapping[str, Tensor]]:
    if not done:
        yield null
    for start in tqdm(
        range(max(done - 1, 0), len(texts), _AT_A_TIME),
        desc="embedding texts, once",
        unit="batch",
        disable=bars_are_hidden(),
    ):
        yield embed(texts[start : start + _AT_A_TIME])
