"""The flags that `evaluate` and `sweep` share."""

from __future__ import annotations

import argparse

from ..training.flag_values import positive_int
from .sampling_flags import add_machine_flags, add_sampler_flags

__all__ = ["DATA_FLAGS", "NUM_IMAGES", "add_judging_flags", "add_measuring_flags"]

NUM_IMAGES = 2048
DATA_FLAGS = ("dataset_config_name", "image_column", "label_column", "conditioning_image_column", "cache_dir")


def add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about data, samples and features."""
    _add_data_flags(parser)
    add_measuring_flags(parser)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds those about data."""
    add = parser.add_argument
    add(
        "--data",
        "--train_data_dir",
        "--dataset_name",
        metavar="FOLDER_FILE_OR_ID",
        help="what samples are compared with: a folder of images, a file of fields (.npy, .npz) or a data set"
        " (default: the embedded Fashion-MNIST images)",
    )
    add("--dataset_config_name", metavar="NAME", help="configuration of that data set, where it has several")
    add("--image_column", metavar="NAME", help="column with the images (default: the first)")
    add("--label_column", metavar="NAME", help="column with the class labels (default: 'label', if it is there)")
    add(
        "--conditioning_image_column",
        metavar="NAME",
        help="column with the images that an image-conditioned model is given",
    )
    add("--cache_dir", metavar="FOLDER", help="where decoded images are kept (default: the Hugging Face cache)")


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Adds those about samples and features."""
    add = parser.add_argument
    add(
        "--num_images",
        type=positive_int,
        metavar="N",
        help=f"samples of each model, and as many images of the data, twice (default: {NUM_IMAGES}, or half of the"
        " data)",
    )
    add(
        "--features",
        default="auto",
        metavar="NAME",
        help="what images are compared by: a vision network of transformers (folder or Hub id); 'classifier', a small"
        " one trained on the data's labels here; 'pixels' (default: facebook/dinov2-small if it can be had, else the"
        " classifier if there are labels, else pixels)",
    )
    add("--fid", action="store_true", help="the Inception FID, too; needs pip install 'reg_diffusers[fid]'")
    add_sampler_flags(parser)
    add("--batch_size", type=positive_int, default=64, metavar="N", help="drawn at once (default: %(default)s)")
    add_machine_flags(parser)
