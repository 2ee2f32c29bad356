"""Settings of the data: the location and format of images and fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from .flag_values import fraction, natural, positive_int, renaming
from .flags import flag
from .size import resolution

__all__ = ["DataSettings"]


@dataclass(frozen=True)
class DataSettings:
    """The data of a run; without `dataset_name` and `train_data_dir`, 5,000 embedded Fashion-MNIST images.

    Raises:
        UsageError: if a setting is not supported.
    """

    dataset_name: str | None = flag(
        None, "Hub id of a data set, or a local folder or file that `datasets` reads (parquet, arrow)"
    )
    dataset_config_name: str | None = flag(None, "configuration of the data set, if it has several")
    train_data_dir: str | None = flag(
        None, "folder of images (subfolders are classes), or an .npy/.npz file of float fields (N, C, H, W)"
    )
    cache_dir: str | None = flag(
        None,
        "folder for downloads and decoded images; default: the Hugging Face cache",
        mathematics=False,
    )
    field_scale: str = flag(
        "channel",
        "how fields are scaled to [-1, 1]: each channel by its own range (channel), or all by the largest (common),"
        " which keeps the ratios between channels, such as those of a velocity, in the units of the network",
        choices=["channel", "common"],
    )
    image_column: str | None = flag(None, "column of the images; default: the first image column")
    class_conditional: bool = flag(False, "condition on the class label of each image")
    label_column: str | None = flag(None, "column of the class labels, for --class_conditional; default: 'label'")
    resolution: int | str | None = flag(
        None,
        "images are resized and cropped to a square of this side or to WIDTHxHEIGHT, such as 256x192; default: that of"
        " a given model, 16 for the embedded data, else 64. Fields keep their size",
        parse=resolution,
        metavar="SIZE",
    )
    buckets: int | None = flag(
        None,
        "group images by aspect ratio into sizes of about the area of --resolution, with sides that are multiples of"
        " this number of pixels, instead of cropping all to one size; 64 is usual. Each batch has one size",
        parse=positive_int,
        metavar="MULTIPLE",
    )
    center_crop: bool = flag(
        False,
        "accepted for compatibility: images are decoded once, so the crop is always central",
        mathematics=False,
    )
    random_crop: bool = flag(
        False,
        "train on a random window of each image in each epoch: images are decoded once, a seventh larger; previews and"
        " measurements show the central window",
    )
    random_flip: bool = flag(False, "flip each image left to right with probability 1/2 in each epoch")
    conditioning_image_column: str | None = flag(
        None, "column of a second image per row; the network learns to generate the first image from it"
    )
    reg_columns: tuple[str, ...] | None = flag(
        None,
        "columns of the data that a regularizer needs under another name, such as mask=segmentation; columns of the"
        " same name are found without the flag. Images are resized, cropped and flipped like their picture",
        parse=renaming,
        metavar="NAME=COLUMN",
        many=True,
    )
    caption_column: str | None = flag(
        None, "column of the texts that describe the images, for a text-to-image model; not read from file names"
    )
    prompt: str | None = flag(None, "one text for all images, in place of --caption_column")
    condition_dropout: float = flag(
        0.0,
        "probability that an image is trained without its text or class label, for classifier-free guidance; 0.1 is"
        " usual",
        parse=fraction,
    )
    streaming: bool = flag(
        False,
        "read images on demand instead of storing all of them decoded: for data that fit neither memory nor disk, such"
        " as a large data set on the Hub. Needs --max_train_steps if the number of images is unknown",
    )
    channels: int | None = flag(
        None,
        "convert images to this number of channels: 1 is grey (luma), 3 RGB (transparency on white), 4 RGBA; default:"
        " that of a given model, else 1 if all images looked at are grey, else 3",
        parse=positive_int,
        choices=[1, 3, 4],
    )
    preserve_input_precision: bool = flag(
        False,
        "keep all bits of 16-bit and floating-point images, and all channels of TIFF files, where images are otherwise"
        " read with 8 bits; samples are written in the same depth",
    )
    skip_bad_images: bool = flag(False, "skip images that cannot be decoded, and report their number")
    dataloader_num_workers: int = flag(
        0, "number of processes that load data; 0: the main process", parse=natural, mathematics=False
    )

    def __post_init__(self):
        if self.random_crop and self.center_crop:
            raise UsageError("--random_crop and --center_crop are mutually exclusive")
        if self.prompt is not None and self.caption_column is not None:
            raise UsageError("--prompt and --caption_column are mutually exclusive")
        names = [renamed.partition("=")[0] for renamed in self.reg_columns or ()]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--reg_columns names {doubled[0]} twice")

    @property
    def has_no_class(self) -> bool:
        """Whether some images are trained without their class label."""
        return self.class_conditional and self.condition_dropout > 0

    @property
    def renamed_columns(self) -> dict[str, str]:
        """The columns of --reg_columns, by their names in the regularizers' `needs`."""
        return dict(renamed.split("=", 1) for renamed in self.reg_columns or ())

    @property
    def source(self) -> str | None:
        """The data set or folder of the flags; None for the embedded data."""
        return self.dataset_name or self.train_data_dir
