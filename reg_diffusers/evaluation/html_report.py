"""Builds the report of an evaluation: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

__all__ = ["Pair", "Part", "page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #666; --line: #d8d8d8; --card: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #161616; --soft: #a5a5a5; --line: #3a3a3a; --card: #202020; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
p, li { max-width: 44rem; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.answer { background: var(--card); border-left: 4px solid var(--ink); padding: 0.75rem 1rem; margin: 1rem 0; }
.answer ul { margin: 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.95rem; min-width: 100%; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; }
figure { margin: 1rem 0; }
.chart { background: #fff; border-radius: 4px; padding: 0.5rem; }
.chart img { display: block; max-width: 100%; margin: 0 auto; }
.grids { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.grids figure { margin: 0; }
.pixels { width: 100%; image-rendering: pixelated; display: block; border: 1px solid var(--line); }
.pairs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.pairs figure { margin: 0; }
.pairs div { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; font-size: 0.95rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
"""


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
    body = [
        f"<h1>{_text(title)}</h1>",
        '<div class="answer"><ul>' + "".join(f"<li>{_text(answer)}</li>" for answer in answers) + "</ul></div>",
        "<h2>Loss against distance</h2>",
        f'<figure class="chart"><img alt="The losses of the table over the distance to the data, one point per set'
        f' of images, with 95 % confidence intervals" src="{_data_uri(figure.read_bytes())}"></figure>',
        '<p class="soft">Lower is better only down to the value of the data (dashed line); left is closer to the'
        " data. Bars are 95 % confidence intervals.</p>",
        "<h2>The numbers</h2>",
        _table(cells),
        '<p class="soft">± is half of a 95 % confidence interval over the samples. The data column compares one half'
        " of the data to the other half, with as many images: a perfect model would reach these values.</p>",
        "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in explanations) + "</dl>",
        "<h2>Samples</h2>",
        '<div class="grids">' + "".join(_grid(part) for part in parts) + "</div>",
    ]
    if any(part.nearest for part in parts):
        body.append("<h2>Copies of the data?</h2>")
        body.append(
            '<p class="soft">Left: a sample. Right: the nearest image of the data. A * marks a sample at least as'
            " close to the data as the closest 5 % of the data are to their own nearest neighbours.</p>"
        )
        body += [_pairs(part) for part in parts if part.nearest]
    body.append("<h2>How it was measured</h2>")
    body.append("<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in settings) + "</dl>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )


def _table(cells: Sequence[Sequence[str]]) -> str:
    head, *lines = cells
    first = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    rest = "".join(
        f'<tr><th scope="row">{_text(name)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>"
        for name, *line in lines
    )
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def _grid(part: Part) -> str:
    alt = f"Some images: {part.title}"
    return f"<figure>{_picture(part.grid, alt)}<figcaption>{_text(part.title)}</figcaption></figure>"


def _pairs(part: Part) -> str:
    shown = [f"<h3>{_text(part.title)}</h3>", f"<p>{_text(part.text)}</p>"]
    for name, pairs in (("The nearest of all samples:", part.nearest), ("The first samples:", part.first)):
        figures = "".join(_pair(number, pair) for number, pair in enumerate(pairs, 1))
        shown.append(f'<p class="soft">{name}</p><div class="pairs">{figures}</div>')
    return "".join(shown)


def _pair(number: int, pair: Pair) -> str:
    return (
        f"<figure><div>{_picture(pair.sample, f'Sample {number}')}"
        f"{_picture(pair.nearest, f'The image of the data nearest to sample {number}')}</div>"
        f"<figcaption>distance {pair.distance:.3g}{' *' if pair.is_near else ''}</figcaption></figure>"
    )


def _picture(picture: PIL.Image.Image, alt: str) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f'<img class="pixels" alt="{_text(alt)}" src="{_data_uri(file.getvalue())}">'


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _text(text: str) -> str:
    return html.escape(text, quote=True).replace(" %", "\u00a0%")
