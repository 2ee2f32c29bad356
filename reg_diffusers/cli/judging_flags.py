"""Flags that `evaluate` and `sweep` share."""

from __future__ import annotations

import argparse

from ..settings.flag_values import positive_int, renaming
from .sampling_flags import add_machine_flags, add_sampler_flags

__all__ = ["DATA_FLAGS", "NUM_IMAGES", "add_judging_flags", "add_measuring_flags"]

NUM_IMAGES = 2048
DATA_FLAGS = ("dataset_config_name", "image_column", "label_column", "conditioning_image_column", "caption_column")
DATA_FLAGS += ("prompt", "cache_dir", "random_crop", "reg_columns")


def add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about data, samples and features."""
    _add_data_flags(parser)
    add_measuring_flags(parser)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about data."""
    add = parser.add_argument
    add(
        "--data",
        "--train_data_dir",
        "--dataset_name",
        metavar="FOLDER_FILE_OR_ID",
        help="data to compare the samples to: a folder of images, a file of fields (.npy, .npz) or a data set"
        " (default: the training data that the models record)",
    )
    add("--dataset_config_name", metavar="NAME", help="configuration of the data set, if it has several")
    add("--image_column", metavar="NAME", help="column of the images (default: the first image column)")
    add("--label_column", metavar="NAME", help="column of the class labels (default: 'label', if it exists)")
    add(
        "--conditioning_image_column",
        metavar="NAME",
        help="column of the conditioning images, for an image-conditioned model",
    )
    add(
        "--caption_column",
        metavar="NAME",
        help="column of the texts, for a text-to-image model: each sample has the text of an image",
    )
    add("--prompt", metavar="TEXT", help="one text for all samples, in place of --caption_column")
    add(
        "--random_crop",
        action="store_true",
        help="compare with the central windows of the images, as --random_crop trains on (default: as recorded)",
    )
    add(
        "--reg_columns",
        type=renaming,
        nargs="+",
        metavar="NAME=COLUMN",
        help="columns of the data that a regularizer needs under another name, such as mask=segmentation (default: as"
        " recorded)",
    )
    add("--cache_dir", metavar="FOLDER", help="folder for decoded images (default: the Hugging Face cache)")


def add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about samples and features."""
    add = parser.add_argument
    add(
        "--num_images",
        type=positive_int,
        metavar="N",
        help="number of samples per model, and of images in each half of the data (default:"
        f" {NUM_IMAGES}, at most half of the data)",
    )
    add(
        "--features",
        default="auto",
        metavar="NAME",
        help="features to compare images by: a vision network of transformers (folder or Hub id); 'classifier', a"
        " small network trained on the labels of the data; or 'pixels' (default: facebook/dinov2-small if available,"
        " else the classifier if there are labels, else pixels)",
    )
    add("--fid", action="store_true", help="also compute the Inception FID; needs pip install 'reg_diffusers[fid]'")
    add_sampler_flags(parser)
    add(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help="images per batch (default: 64; 1 for a text-to-image model)",
    )
    add_machine_flags(parser)
