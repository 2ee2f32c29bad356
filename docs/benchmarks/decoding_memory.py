"""Computes the memory for decoding one image with a gradient, without a GPU: tensors on the meta device have no data.

    python docs/benchmarks/decoding_memory.py

"saved" is what autograd saves in the forward pass, "peak" the most memory that tensors occupy at the same time in the
forward and the backward pass. Both leave out the weights. Real peaks are higher by the workspace of convolutions; they
are lower if attention runs in a kernel that does not store its matrix, which is 1 GiB in float32 at 1024 pixels. The
table is printed and kept in decoding_memory.txt and decoding_memory.json beside this file.
"""

import json
import weakref
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from reg_diffusers.views import DecodedImage

RESULT = Path(__file__)
GIB = 2**30
PIXELS = (512, 1024)
LATENT_SIDE = 8  # pixels per side of a latent pixel
STABLE_DIFFUSION = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# checkpointing, whether the autoencoder checkpoints its blocks before the view is made, crop
SETTINGS = {
    "checkpointing=False": (False, False, None),
    "the same, vae.enable_gradient_checkpointing()": (False, True, None),
    "checkpointing=True": (True, False, None),
    "checkpointing=True, crop=32": (True, False, 32),
}


def main() -> None:
    with torch.device("meta"):
        autoencoders = {
            "Stable Diffusion's AutoencoderKL": AutoencoderKL(**STABLE_DIFFUSION),
            "AutoencoderTiny": AutoencoderTiny(),
        }
    rows = [
        {"autoencoder": name, "dtype": dtype, "setting": setting, **_measure(vae, dtype, setting)}
        for name, vae in autoencoders.items()
        for dtype in DTYPES
        for setting in SETTINGS
    ]
    text = _table(rows)
    print(text, end="")
    RESULT.with_suffix(".txt").write_text(text)
    RESULT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def _measure(vae: nn.Module, dtype: str, setting: str) -> dict[str, float]:
    """Measures one image of each size, in GiB."""
    checkpointing, of_blocks, crop = SETTINGS[setting]
    nn.Module.to(vae, DTYPES[dtype])
    vae.enable_gradient_checkpointing() if of_blocks else vae.disable_gradient_checkpointing()
    view, found = DecodedImage(vae, checkpointing=checkpointing, crop=crop), {}
    for pixels in PIXELS:
        x0_hat = torch.empty(1, 4, pixels // LATENT_SIDE, pixels // LATENT_SIDE, device="meta", requires_grad=True)
        found[f"saved {pixels}"] = _saved(vae, view, x0_hat) / GIB
        with Occupied() as occupied:
            view(x0_hat).sum().backward()
        found[f"peak {pixels}"] = occupied.peak / GIB
    return found


def _saved(vae: nn.Module, view: nn.Module, x0_hat: torch.Tensor) -> int:
    """Returns the bytes that autograd saves in the forward pass, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in vae.parameters()}
    storages = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        view(x0_hat)
    return sum(storage.nbytes() for storage in storages.values())


class Occupied(TorchDispatchMode):
    """Follows the bytes of all tensors that are computed inside; views of others, such as weights, have none."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._now = 0
        self._storages = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if _is_tensor(tensor)}
        results = function(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            storage = tensor.untyped_storage() if _is_tensor(tensor) else None
            if storage is not None and storage not in self._storages and storage._cdata not in given:
                self._storages.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return results

    def _add(self, change: int) -> None:
        self._now += change
        self.peak = max(self.peak, self._now)


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def _table(rows: list[dict]) -> str:
    lines = [
        f"GiB per image, decoded and differentiated; torch {torch.__version__.partition('+')[0]}, diffusers"
        f" {diffusers.__version__}",
        "",
    ]
    headings = "".join(f"{f'{kind} {pixels}':>12}" for pixels in PIXELS for kind in ("saved", "peak"))
    for name in dict.fromkeys(row["autoencoder"] for row in rows):
        lines.append(f"{name:<58}{headings}")
        for row in (row for row in rows if row["autoencoder"] == name):
            values = [row[f"{kind} {pixels}"] for pixels in PIXELS for kind in ("saved", "peak")]
            label = f"{row['dtype']}, {row['setting']}"
            lines.append(f"{label:<58}" + "".join(f"{value:>12.2f}" for value in values))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
