"""The picture of --buckets in docs/data.md: what is cut off from images of five shapes.

python docs/figures/buckets.py
"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from shared import save

from reg_diffusers.data.buckets import bucket_sizes, nearest_sizes

IMAGE_SIZES = [(400, 1200), (400, 640), (500, 500), (700, 400), (1200, 400)]  # height, width
SIZE, MULTIPLE = (256, 256), 64
KEPT, CUT = "0.35", "0.85"


def main() -> None:
    sizes = bucket_sizes(SIZE, MULTIPLE)
    nearest = [sizes[place] for place in nearest_sizes(np.array(IMAGE_SIZES), sizes)]
    rows = {"--resolution 256": [SIZE] * len(IMAGE_SIZES), "--resolution 256 --buckets 64": nearest}
    figure, axes = plt.subplots(2, len(IMAGE_SIZES), figsize=(7.2, 3.8), layout="constrained")
    for line, (title, chosen) in zip(axes, rows.items(), strict=True):
        line[0].set_title(title, loc="left", fontsize=9, family="monospace")
        for axis, image, size in zip(line, IMAGE_SIZES, chosen, strict=True):
            draw(axis, image, size)
    save(figure, "buckets")


def draw(axis, image: tuple[int, int], size: tuple[int, int]) -> None:
    """Draws the outline of an image, and the part that is kept when it is resized to cover a size and cropped."""
    height, width = image
    shrunk = max(size[0] / height, size[1] / width)
    kept_height, kept_width = size[0] / shrunk, size[1] / shrunk
    axis.add_patch(Rectangle((-width / 2, -height / 2), width, height, facecolor=CUT, edgecolor="black"))
    axis.add_patch(
        Rectangle((-kept_width / 2, -kept_height / 2), kept_width, kept_height, facecolor=KEPT, edgecolor="black")
    )
    axis.text(0, -height / 2 - 60, f"{size[1]} x {size[0]}", ha="center", va="top", fontsize=8)
    axis.set(xlim=(-610, 610), ylim=(-850, 610), aspect="equal")
    axis.axis("off")


if __name__ == "__main__":
    main()
