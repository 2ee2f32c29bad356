"""The texts of a data set and their embeddings, computed once and mapped into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __version__
from ..runtime.messages import bars_are_hidden
from .stored_rows import stored_rows

__all__ = ["Prompts"]

_AT_A_TIME = 8


class Prompts:
    """One text per image, with its embedding; equal texts share one.

    Args:
        texts: the text of each image.
        embed: n texts -> (n, L, D).
        key: a hash of everything that affects `embed`.
        cache_dir: the folder that keeps the embeddings for the next run.

    Attributes:
        texts: as given.
        empty: the embedding of the empty text, (L, D).
        fingerprint: identifies the text of each image and what embeds it.
    """

    def __init__(self, texts: list[str], embed: Callable[[list[str]], Tensor], key: str, cache_dir: Path):
        self.texts = texts
        self.fingerprint = hashlib.sha256(repr((texts, key)).encode()).hexdigest()
        distinct = list(dict.fromkeys(["", *texts]))
        name = hashlib.sha256(repr((distinct, key, __version__)).encode()).hexdigest()
        self._embeddings = stored_rows(
            cache_dir / f"prompts-{name}.npy", len(distinct), lambda: _pieces(distinct, embed)
        )
        place = {text: number for number, text in enumerate(distinct)}
        self._places = np.array([place[text] for text in texts])
        self.empty = torch.from_numpy(np.array(self._embeddings[0]))

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Reads the embeddings of the texts of these images, (B, L, D)."""
        return torch.from_numpy(np.array(self._embeddings[self._places[indices]]))


def _pieces(texts: list[str], embed: Callable[[list[str]], Tensor]) -> Iterator[Tensor]:
    for start in tqdm(
        range(0, len(texts), _AT_A_TIME), desc="embedding texts, once", unit="batch", disable=bars_are_hidden()
    ):
        yield embed(texts[start : start + _AT_A_TIME])
