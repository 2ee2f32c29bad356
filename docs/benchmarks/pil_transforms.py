"""The few transforms of torchvision that diffusers' training script uses, through PIL, where torchvision is not.

Each does to an 8-bit RGB picture what the one of the same name does: the same resampling by the same PIL, the same
crop and flip, the same scaling to [0, 1]. Put into `sys.modules` as "torchvision" by `pretend_to_be_torchvision`, for
the process of a benchmark alone.
"""

import importlib.machinery
import random
import sys
import types

import numpy as np
import PIL.Image
import torch


class InterpolationMode:
    BILINEAR = PIL.Image.Resampling.BILINEAR


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class Resize:
    """The shorter side gets the size; nothing is done where it has it."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image):
        width, height = image.size
        short = min(width, height)
        if short == self.size:
            return image
        return image.resize((self.size * width // short, self.size * height // short), self.interpolation)


class RandomCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        left, top = (random.randint(0, side - self.size) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class CenterCrop(RandomCrop):
    def __call__(self, image):
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    def __call__(self, image):
        return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


class PILToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ToTensor(PILToTensor):
    def __call__(self, image):
        return super().__call__(image).float().div(255)


class ConvertImageDtype:
    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, tensor):
        return tensor.to(self.dtype) / 255


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, tensor):
        return (tensor - self.mean) / self.std


def pretend_to_be_torchvision() -> None:
    """From now on `from torchvision import transforms` gives the classes above, in this process.

    To be called when all other libraries are imported, which would ask for more of torchvision.
    """
    package = types.ModuleType("torchvision")
    package.transforms = sys.modules[__name__]
    for name, module in {"torchvision": package, "torchvision.transforms": package.transforms}.items():
        if module is package:
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
