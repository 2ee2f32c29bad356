"""The few transforms of torchvision that diffusers' training script uses, through PIL, where torchvision is not.

    python docs/benchmarks/pil_transforms.py path/to/train_unconditional.py --train_data_dir photos ...

Each does to an 8-bit RGB picture what the one of the same name does: the same resampling by the same PIL, the same
crop and flip, the same scaling to [0, 1]. Put into `sys.modules` as "torchvision" for the process of one script alone.
"""

import importlib.machinery
import random
import runpy
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


def run_script(path: str, flags: list[str]) -> None:
    """Runs a script from its `main`, for which `from torchvision import transforms` gives the classes above."""
    import datasets  # noqa: F401  (all that looks for torchvision comes first: it would ask for more of it)
    from diffusers import DDPMPipeline, UNet2DModel  # noqa: F401

    package = types.ModuleType("torchvision")
    package.transforms = sys.modules[__name__]
    package.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    sys.modules |= {"torchvision": package, "torchvision.transforms": package.transforms}
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run_script(sys.argv[1], sys.argv[2:])
