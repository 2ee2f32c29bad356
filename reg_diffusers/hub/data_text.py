"""The part of a model card about the images of the training: channels, depth, sizes."""

from __future__ import annotations

__all__ = ["data_text"]

_OF_CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}


def data_text(data: dict) -> str:
    """Describes the images of a training in a few sentences.

    Args:
        data: the entry "data" of reg_config.json.
    """
    channels, white = data["shape"][0], data.get("white")
    depth = "8 bits" if white is None else f"all bits of values up to {white:,}"
    text = f"The images are {_OF_CHANNELS.get(channels, f'of {channels} channels')}, with {depth}."
    if not data.get("sizes"):
        return text
    sizes = ", ".join(f"{size} ({number:,})" for size, number in data["sizes"].items())
    return (
        f"{text} They have {len(data['sizes'])} sizes near their own aspect ratios: {sizes} images. `height=` and"
        " `width=` of the pipeline draw any of them; the default is the most frequent one."
    )
