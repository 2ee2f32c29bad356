"""Builds the report of an evaluation: one self-contained HTML file, from the template report.html.j2."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

__all__ = ["Pair", "Part", "page"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Pair:
    """A sample and the nearest image of the data.

    Attributes:
        sample: the sample.
        nearest: its nearest image.
        distance: the distance between the two.
        is_near: whether the distance is within the limit of near copies.
    """

    sample: PIL.Image.Image
    nearest: PIL.Image.Image
    distance: float
    is_near: bool


@dataclass(frozen=True)
class Part:
    """The part of the report on one set of images.

    Attributes:
        title: the name of the set.
        grid: a grid of some of its images.
        text: a sentence on near copies, or "".
        nearest: the samples closest to an image of the data, the closest first.
        first: the first samples, in the order in which they were drawn.
    """

    title: str
    grid: PIL.Image.Image
    text: str = ""
    nearest: Sequence[Pair] = ()
    first: Sequence[Pair] = ()


def page(
    title: str,
    answers: Sequence[str],
    cells: Sequence[Sequence[str]],
    explanations: Sequence[tuple[str, str]],
    parts: Sequence[Part],
    settings: Sequence[tuple[str, str]],
    figure: Path,
) -> str:
    """Builds the HTML of the report.

    Args:
        title: the title of the page.
        answers: the sentences at the top of the page.
        cells: the rows of the table; the first row is its head.
        explanations: pairs of a number's name and its meaning.
        parts: the images of each set.
        settings: pairs of a setting's name and its value.
        figure: a PNG file, which is embedded.
    """
    import jinja2

    head, *lines = cells
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["embedded"] = _embedded
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        answers=answers,
        head=head,
        lines=lines,
        explanations=explanations,
        parts=parts,
        settings=settings,
        figure=_data_uri(figure.read_bytes()),
    )


def _embedded(picture: PIL.Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _unbroken(value: object) -> object:
    """Keeps a number and its % on one line."""
    return value.replace(" %", "\u00a0%") if hasattr(value, "replace") else value
