"""The part of a model card about the images of the training: channels, depth, sizes."""

from __future__ import annotations

__all__ = ["data_text"]

_OF_CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}


def data_text(data: dict, draws: str = "the default is") -> str:
    """Describes the images of a training in a few sentences; "" if their shape is not recorded.

    Args:
        data: the entry "data" of reg_config.json.
        draws: what draws the most frequent of several sizes, with its verb.
    """
    if "shape" not in data:  # a record of other software
        return ""
    channels, white = data["shape"][0], data.get("white")
    depth = "8 bits" if white is None else f"all bits of values up to {white:,}"
    text = f"The images are {_OF_CHANNELS.get(channels, f'of {channels} channels')}, with {depth}."
    if data.get("original_sizes"):
        text += (
            f" The network was given the size of each image before it was resized ({data['original_sizes']}) and the"
            " corner of its crop."
        )
    if not data.get("sizes"):
        return text
    sizes = ", ".join(f"{size} ({number:,})" for size, number in data["sizes"].items())
    return (
        f"{text} They have {len(data['sizes'])} sizes near their own aspect ratios: {sizes} images. `height=` and"
        f" `width=` of the pipeline draw any of them; {draws} the most frequent one."
    )
