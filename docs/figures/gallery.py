"""The pictures of docs/regularizers.md: samples without a loss, with it, and the data.

    python docs/benchmarks/gallery.py --output gallery
    python docs/figures/gallery.py [NAME ...] [--runs gallery]

Draws what the first command has trained and sampled. Samples of the two networks start from the same noise. Of fields,
the first row shows one channel, and the second the size of the residual: white is 0, black the largest one without the
loss.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image
from shared import IMAGES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gallery_cases
from gallery import held_out
from gallery_cases import CASES, Case, Data

ROWS, COLUMNS = 3, 3
FIRST = 27  # of the samples shown, the same for all losses; among them are boots, whose mirror image is another
LINE = 0.7  # grey of the lines, visible beside white tiles
WIDTH, TITLE, DOTS = 7.2, 0.32, 100  # inches
SPACE = 0.02  # between the parts, as a share of the width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; all by default")
    parser.add_argument(
        "--runs", type=Path, default=Path("gallery"), help="folder that docs/benchmarks/gallery.py wrote"
    )
    args = parser.parse_args()
    for name in args.names or CASES:
        draw(name, CASES[name], args.runs)


def draw(name: str, case: Case, runs: Path) -> None:
    """Writes docs/images/gallery/NAME.png."""
    data = getattr(gallery_cases, case.data)()
    files = (f"{case.data}-{case.prediction}-plain.pt", f"{name}-{case.weight:g}.pt")
    shown = [torch.load(runs / file, weights_only=True)["samples"] for file in files]
    parts = dict(zip(("plain", "with it", "data"), (*shown, held_out(data)), strict=True))
    tiles = [tiled(images, case, data) for images in parts.values()]
    black = [max(rows[place].abs().max() for rows in tiles[:1]) for place in range(len(tiles[0]))]
    width, rows = (1 - 2 * SPACE) / 3, ROWS if case.residual is None else 2
    height = WIDTH * width * rows / COLUMNS
    share = height / (height + TITLE)
    figure = plt.figure(figsize=(WIDTH, height + TITLE), dpi=DOTS)
    for place, (title, part) in enumerate(zip(parts, tiles, strict=True)):
        axis = figure.add_axes((place * (width + SPACE), 0, width, share))
        axis.imshow(picture(part, case, black), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.axis("off")
        figure.text(place * (width + SPACE) + width / 2, share + 0.15 * (1 - share), title, ha="center", fontsize=16)
    path = IMAGES / "gallery" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    Image.open(path).convert("L").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote docs/images/gallery/{path.name}, {path.stat().st_size // 1000} kB")


def tiled(images, case: Case, data: Data) -> list:
    """Images of a channel in the units of the loss, and of the residual."""
    images = images[FIRST : FIRST + ROWS * COLUMNS]
    if case.residual is None:
        return [images[:, 0]]
    fields = data.units(images[:COLUMNS])
    return [fields[:, 0], case.residual(fields).abs()]


def picture(rows: list, case: Case, black: list):
    """All tiles of a part in one array, from 0 (black) to 1 (white), with a line between them."""
    if case.residual is None:
        return joined((rows[0].clamp(-1, 1) + 1) / 2, ROWS)
    fields = (rows[0] / black[0] + 1) / 2
    return torch.cat([joined(fields, 1), joined(1 - rows[1] / black[1], 1)])


def joined(images, rows: int):
    framed = torch.nn.functional.pad(images.clamp(0, 1), (0, 1, 0, 1), value=LINE)
    return torch.cat([torch.cat(list(row), 1) for row in framed.chunk(rows)], 0)


if __name__ == "__main__":
    main()
