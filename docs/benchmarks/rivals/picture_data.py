"""The pictures of cases E and F, and the networks that see them: of the perceptual loss, and of the judges."""

from __future__ import annotations

import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.features import train_classifier
from reg_diffusers.regularizers import Perceptual
from reg_diffusers.regularizers.network_input import NetworkInput
from reg_diffusers.settings import DataSettings

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
from real_weights import MOBILENET_PROCESSOR, PROCESSOR, efficientnet, mobilenet

FONTS = (  # of matplotlib
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
)


@dataclass(frozen=True)
class Pictures:
    """Pictures in [-1, 1] to train on, others to compare with, and the features to judge by.

    Attributes:
        known: (N, 1, H, W).
        held_out: (M, 1, H, W), as many as samples are drawn.
        features: (n, 1, H, W) -> (n, D).
    """

    known: Tensor
    held_out: Tensor
    features: Callable[[Tensor], Tensor]

    @cached_property
    def expected(self) -> Tensor:
        """The features of the held-out pictures."""
        return self.features(self.held_out)


@cache
def letters() -> Pictures:
    """A to Z and a to z in 13 fonts, bright on black, in four sizes and places."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    generator, found = torch.Generator().manual_seed(0), []
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for font in FONTS:
        for size in (22, 24, 26, 28):
            face = ImageFont.truetype(folder / f"{font}.ttf", size)
            for letter in string.ascii_letters:
                picture = Image.new("L", (32, 32))
                shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
                place = (16 + shift[0], 16 + shift[1])
                ImageDraw.Draw(picture).text(place, letter, fill=255, font=face, anchor="mm")
                found.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, 32, 32))
    pictures = torch.stack(found)[torch.randperm(len(found), generator=generator)] / 127.5 - 1
    return Pictures(pictures[400:], pictures[:400], _mobilenet())


@cache
def clothes() -> Pictures:
    """The embedded pictures at 16 x 16; the classifier sees all of them and favours no half."""
    data = load_training_data(DataSettings(resolution=16, class_conditional=True))
    rows = data.examples.__getitems__(list(range(len(data))))
    pictures, labels = data.normalization.normalize(rows["values"]), torch.as_tensor(rows["class_labels"])
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    judging = train_classifier(pictures, labels, int(labels.max()) + 1)
    return Pictures(pictures[order[768:]], pictures[order[:768]], judging.extract)


def _mobilenet() -> Callable[[Tensor], Tensor]:
    """The last 320 feature maps of MobileNetV2, averaged, of pictures that are enlarged to 64 x 64."""
    net, shown = mobilenet().mobilenet_v2, NetworkInput.of(MOBILENET_PROCESSOR, size=64)

    def features(images: Tensor) -> Tensor:
        pictures = shown(((images.clamp(-1, 1) + 1) / 2).expand(-1, 3, -1, -1))
        return net(pictures, output_hidden_states=True).hidden_states[-1].mean((2, 3))

    return features


@cache
def perceptual() -> Perceptual:
    """Features of EfficientNet-Lite0 after its third and fifth blocks, of pictures of 32 x 32."""
    net = efficientnet()
    net._blocks = net._blocks[:5]
    return Perceptual(net, PROCESSOR, layers=(2, 4), size=32)
