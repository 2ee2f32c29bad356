"""The pictures of --preserve_input_precision and --random_crop in docs/data.md.

python docs/figures/pictures.py
"""

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from shared import LINES, images, save

from reg_diffusers.data.crops import drawn, larger

SIZE, EPOCHS = (28, 28), 4


def depth() -> None:
    """A smooth dark ramp of 12 bits in a 16-bit file: values from 1,000 to 1,160 of 4,095."""
    rows, columns = np.mgrid[:64, :64] / 63
    scan = (1000 + 160 * (rows + columns) / 2).round()
    read = {"8 bits (default)": scan // 256, "--preserve_input_precision": scan}
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.5), layout="constrained", width_ratios=(1, 1, 1.4))
    for axis, (title, pixels) in zip(axes, read.items(), strict=False):
        axis.imshow(pixels, cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=9, family="monospace" if title.startswith("-") else None)
        axis.set(xticks=[], yticks=[], xlabel=f"{len(np.unique(pixels))} different values, contrast stretched")
        axis.grid(False)
    whites = {"8 bits (default)": 255, "--preserve_input_precision": 4095}
    for line, (title, pixels) in zip(LINES[1:], read.items(), strict=False):
        axes[2].plot(2 * np.diag(pixels) / whites[title] - 1, label=title, **line)
    axes[2].set(xlabel="pixel along the diagonal", title="what the network sees", ylim=(-1.05, 0.25))
    axes[2].legend(loc="upper right")
    save(figure, "depth")


def random_crop() -> None:
    stored = larger(SIZE)
    chosen = torch.nn.functional.interpolate(images()[0][[0, 8, 17]], stored, mode="bilinear", antialias=True)
    figure, axes = plt.subplots(3, EPOCHS + 1, figsize=(6.4, 4.2), layout="constrained")
    ids = torch.arange(len(chosen))
    rows = torch.arange(stored[0]).reshape(1, 1, -1, 1).expand(len(chosen), 1, *stored)
    columns = torch.arange(stored[1]).reshape(1, 1, 1, -1).expand(len(chosen), 1, *stored)
    for number, line in enumerate(axes):
        line[0].imshow(chosen[number, 0], cmap="gray", interpolation="nearest")
    for epoch in range(EPOCHS):
        batch = {"values": chosen, "ids": ids, "columns": {"top": rows, "left": columns}}
        windows = drawn(batch, SIZE, seed=0, epoch=epoch)
        for number, line in enumerate(axes):
            corner = (windows["columns"][name][number, 0, 0, 0].item() - 0.5 for name in ("left", "top"))
            style = LINES[epoch + 1]
            line[0].add_patch(Rectangle(tuple(corner), *SIZE[::-1], fill=False, linewidth=1.6, clip_on=False,
                                        edgecolor=style["color"], linestyle=style["linestyle"]))  # fmt: skip
            line[epoch + 1].imshow(windows["values"][number, 0], cmap="gray", interpolation="nearest")
            for spine in line[epoch + 1].spines.values():
                spine.set(visible=True, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
    titles = [f"stored, {stored[1]} x {stored[0]}", *(f"epoch {epoch}" for epoch in range(EPOCHS))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    save(figure, "random_crop")


if __name__ == "__main__":
    depth()
    random_crop()
