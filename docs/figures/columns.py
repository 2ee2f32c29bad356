"""The picture of columns for a loss in docs/data.md: picture, mask and paired image through the same crops and flips.

python docs/figures/columns.py
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from shared import images, save, show

from reg_diffusers.data.crops import drawn
from reg_diffusers.data.training_data import Wanted, load_training_data
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.batches import Context, flip_half

SIZE, EPOCHS, SEED = 56, 4, 1
FILES = {"picture": (96, 72), "mask": (48, 36), "edges": (96, 72)}  # width, height


def write(folder: Path) -> None:
    """A boot at the right of its picture, a mask of half the size, and its outlines."""
    boot = torch.nn.functional.pad(images()[0][[0]], (6, 2, 1, 1), value=-1.0)
    picture = torch.nn.functional.interpolate(boot, FILES["picture"][::-1], mode="bicubic", antialias=True)[0, 0]
    steps = np.hypot(*np.gradient(picture.numpy()))
    found = {"picture": (picture.numpy() + 1) / 2, "mask": picture.numpy() > -0.8, "edges": steps / steps.max()}
    for name, values in found.items():
        grey = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
        grey.resize(FILES[name], Image.Resampling.NEAREST).save(folder / f"{name}.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "mask", "edges"], ["picture.png", "mask.png", "edges.png"]])


def main() -> None:
    wanted = [Wanted("mask", "mask", is_mask=True), Wanted("edges", "edges")]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        flags = f"--train_data_dir {folder} --cache_dir {folder}/cache --resolution {SIZE} --random_crop".split()
        data = load_training_data(parse_args([*flags, "--image_column", "image"]).data, wanted=wanted)
        stored = data.uncropped.__getitems__([0])
        files = {name: np.asarray(Image.open(Path(folder, f"{name}.png"))) for name in FILES}
    torch.manual_seed(SEED)
    figure, axes = plt.subplots(
        3, EPOCHS + 1, figsize=(7.2, 4.1), layout="constrained", width_ratios=(1.33, 1, 1, 1, 1)
    )
    for row, (name, (width, height)) in enumerate(FILES.items()):
        axes[row, 0].imshow(files[name], cmap="gray", interpolation="nearest")
        axes[row, 0].set(xticks=[], yticks=[], title=f"{name}, {width} x {height}")
        axes[row, 0].grid(False)
    for epoch in range(EPOCHS):
        batch = drawn(stored, (SIZE, SIZE), seed=0, epoch=epoch)
        picture, context = flip_half(data.normalization.normalize(batch["values"]), Context.of_batch(data, batch))
        is_flipped = not torch.equal(picture, data.normalization.normalize(batch["values"]))
        seen = (picture, 2 * context.columns["mask"] - 1, context.columns["edges"])
        for row, image in enumerate(seen):
            show(axes[row, epoch + 1], image)
        axes[0, epoch + 1].set_title(f"epoch {epoch}{', flipped' if is_flipped else ''}")
    save(figure, "columns")


if __name__ == "__main__":
    main()
