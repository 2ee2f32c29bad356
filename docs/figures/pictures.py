"""The pictures of rectangles, channels, --preserve_input_precision and --random_crop in docs/data.md.

python docs/figures/pictures.py
"""

import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from shared import LINES, images, save

from reg_diffusers.data.crops import drawn, larger
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.settings import DataSettings

SIZE, EPOCHS = (28, 28), 4


def as_trained_on(pixels: np.ndarray, **settings) -> np.ndarray:
    """Returns a picture as train_reg.py decodes it with these settings, (H, W, C)."""
    with tempfile.TemporaryDirectory() as folder:
        PIL.Image.fromarray(pixels).save(Path(folder, "0.png"))
        data = load_training_data(DataSettings(train_data_dir=folder, cache_dir=f"{folder}/.cache", **settings))
        return data.__getitems__([0])["values"][0].permute(1, 2, 0).numpy()


def show(axis, pixels: np.ndarray, title: str, below: str = "") -> None:
    grey = pixels.ndim == 2 or pixels.shape[2] == 1
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest") if grey else axis.imshow(pixels)
    axis.set_title(title, fontsize=9, family="monospace" if title.startswith("-") else None)
    axis.set(xticks=[], yticks=[], xlabel=below)
    axis.grid(False)


def rectangles() -> None:
    """A landscape, 16 to 9: sky, a sun at the left, a tree at the right."""
    y, x = np.mgrid[:180, :320]
    picture = np.stack([120 + y / 3, 150 + y / 3, 230 - y / 6], axis=2)
    picture[(x - 40) ** 2 + (y - 45) ** 2 < 24**2] = (250, 225, 80)
    picture[y > 125 + 15 * np.sin(x / 45)] = (70, 120, 60)
    picture[(abs(x - 275) < 6) & (y > 80) & (y < 140)] = (90, 60, 40)
    picture[(x - 275) ** 2 + (y - 70) ** 2 < 30**2] = (30, 80, 40)
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.1), layout="constrained", width_ratios=(16, 9, 16))
    pixels = picture.astype(np.uint8)
    show(axes[0], pixels, "the file", "320 x 180")
    for axis, size in zip(axes[1:], ("90", "160x90"), strict=True):
        kept = as_trained_on(pixels, resolution=size)
        show(axis, kept, f"--resolution {size}", f"{kept.shape[1]} x {kept.shape[0]}")
    save(figure, "rectangles")


def channels() -> None:
    """A ball that becomes transparent to the right, on nothing; the file is shown on a chequered ground."""
    y, x = np.mgrid[:192, :192] / 2
    inside = (x - 48) ** 2 + (y - 48) ** 2 < 42**2
    colours = np.stack([60 + 1.5 * y, 90 + 0 * y, 220 - 1.5 * y], axis=2)
    opacity = np.where(inside, 255 - 2.2 * np.clip(x - 20, 0, 90), 0)
    pixels = np.concatenate([colours, opacity[..., None]], axis=2).astype(np.uint8)
    ground = np.where((x // 8 + y // 8) % 2 == 0, 255, 205)[..., None]
    share = pixels[..., 3:] / 255
    figure, axes = plt.subplots(1, 5, figsize=(7.6, 2.0), layout="constrained")
    show(axes[0], (pixels[..., :3] * share + ground * (1 - share)).astype(np.uint8), "the file", "on chequers")
    for axis, number in zip(axes[1:3], (1, 3), strict=True):
        found = as_trained_on(pixels, resolution=96, channels=number)
        show(axis, found, f"--channels {number}", {1: "grey", 3: "RGB"}[number])
    found = as_trained_on(pixels, resolution=96, channels=4)
    show(axes[3], found[..., :3], "--channels 4", "RGB, and ...")
    show(axes[4], found[..., 3], "", "... opacity")
    save(figure, "channels")


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
    rectangles()
    channels()
    depth()
    random_crop()
