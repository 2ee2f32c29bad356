"""What the figures of this folder have in common: images, line styles, saving."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

import reg_diffusers

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        "axes.grid": True,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.fontsize": 8,
        "lines.linewidth": 1.8,
    }
)

IMAGES = Path(__file__).parents[1] / "images"
PARQUET = Path(reg_diffusers.__file__).parent / "data" / "fashion_mnist.parquet"

# The colours of Okabe & Ito (2008), each with a line style of its own for print in grey.
LINES = [
    {"color": "#000000", "linestyle": "-"},
    {"color": "#0072B2", "linestyle": "--"},
    {"color": "#D55E00", "linestyle": "-."},
    {"color": "#009E73", "linestyle": ":"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
]


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures that ship with the package, (N, 1, 28, 28) in [-1, 1], and their classes, (N,)."""
    table = pyarrow.parquet.read_table(PARQUET).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("L")) for image in table["image"]])
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1, torch.tensor(table["label"])


def show(axis, image: torch.Tensor, limit: float = 1.0) -> None:
    """A grey picture without axes; black is -limit, white is limit."""
    axis.imshow(image.squeeze(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def save(figure, name: str) -> None:
    """Writes docs/images/NAME.png, the same bytes each time."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(f"wrote docs/images/{path.name}, {path.stat().st_size // 1000} kB")
