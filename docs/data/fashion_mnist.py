"""Makes reg_diffusers/data/fashion_mnist.parquet from the files of the Fashion-MNIST data set.

    python docs/data/fashion_mnist.py FOLDER        # holds train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz

Debian has them in the package dataset-fashion-mnist, under /usr/share/datasets/fashion-mnist.
"""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

IMAGES_PER_CLASS = 500
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
PARQUET = Path(__file__).parents[2] / "reg_diffusers" / "data" / "fashion_mnist.parquet"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def unzipped(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def main(folder: Path) -> None:
    images = np.frombuffer(unzipped(folder / "train-images-idx3-ubyte.gz"), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(unzipped(folder / "train-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    first = [np.flatnonzero(labels == label)[:IMAGES_PER_CLASS] for label in range(len(CLASSES))]
    chosen = np.sort(np.concatenate(first))
    columns = {
        "image": [{"bytes": png(images[index]), "path": None} for index in chosen],
        "label": labels[chosen].tolist(),
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    Dataset.from_dict(columns, features=features).to_parquet(PARQUET)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
