"""Saves a fine-tuned network as a complete pipeline: the other parts are copied from the pipeline that it began as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..hub.model_index import check_components, check_weights
from ..runs.run_folder import BEST_FOLDER, CONFIG_FILE, PLAIN_FOLDER
from ..runtime.errors import UsageError
from ..runtime.links import is_part_of
from .families import loaded_in
from .text_to_image import RegTextToImagePipeline

__all__ = ["base_folder", "copied_files", "load_whole_pipeline", "save_whole_pipeline"]

_INDEX = "model_index.json"
_COPIED = (".safetensors", ".json", ".txt", ".model")  # weights, configs, vocabularies
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


def base_folder(base: str, component: str, cache_dir: str | None = None) -> Path:
    """Returns the folder of a pipeline with all its parts; one on the Hub is downloaded if it is not in the cache.

    Args:
        base: folder or Hub id.
        component: name of the network, which is not copied.
        cache_dir: folder of downloads.

    Raises:
        UsageError: it cannot be downloaded, a part has no weights but pickles, or a file is a link out of the folder.
    """
    try:
        folder = Path(base)
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(base, cache_dir=cache_dir, use_safetensors=True))
        for part in _parts(folder, component):
            check_weights(folder / part)
        for path in copied_files(folder, component):
            if not is_part_of(str(path), str(folder)):
                raise ValueError(f"{path} is a link out of the folder: replace it by its target")
    except Exception as error:  # of any type, because the files may be corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--pretrained_model_name_or_path {base}: cannot be saved again as a whole: {reason}"
        ) from error
    return folder


def copied_files(base: Path, component: str) -> Iterator[Path]:
    """Yields the files of a pipeline except its network and its index; weights in half precision are left out."""
    for part in _parts(base, component):
        for path in sorted((base / part).rglob("*")):
            is_variant = path.suffix == ".safetensors" and any(variant in path.name for variant in _VARIANTS)
            if path.suffix in _COPIED and path.is_file() and not is_variant:
                yield path


def save_whole_pipeline(network: torch.nn.Module, component: str, base: Path, folder: Path) -> None:
    """Writes a complete pipeline: this network, and the other parts of `base`.

    Args:
        network: the network.
        component: its name in the pipeline.
        base: folder of the pipeline, see `base_folder`.
        folder: where to write.
    """
    network.save_pretrained(folder / component)
    for path in copied_files(base, component):
        target = folder / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # of a link, what it points to
    index = _index(base)
    index.pop("_name_or_path", None)  # a path on this machine
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load_whole_pipeline(
    model: str, cache_dir: str | None = None, dtype: torch.dtype = torch.float32
) -> RegTextToImagePipeline:
    """Loads a text-to-image pipeline; one that train_reg.py wrote draws images of the size of its training.

    Args:
        model: folder or Hub id.
        cache_dir: folder of downloads.
        dtype: dtype of all parts.

    Raises:
        OSError: there is no such pipeline.
        ValueError: it cannot be used.
    """
    check_components(DiffusionPipeline.load_config(model, cache_dir=cache_dir))
    stock = loaded_in(dtype, DiffusionPipeline, model, cache_dir=cache_dir, use_safetensors=True)
    folder = Path(model)
    record = folder / CONFIG_FILE
    if folder.name in (PLAIN_FOLDER, BEST_FOLDER) and not record.is_file():  # in the folder of a run
        record = folder.parent / CONFIG_FILE
    shape = json.loads(record.read_text(encoding="utf-8"))["data"]["shape"] if record.is_file() else (None,) * 3
    return RegTextToImagePipeline.of(stock, *shape[1:])


def _index(folder: Path) -> dict:
    return json.loads((folder / _INDEX).read_text(encoding="utf-8"))


def _parts(folder: Path, component: str) -> list[str]:
    """Returns the names of the subfolders of a pipeline, without that of its network."""
    parts = {name for name, value in _index(folder).items() if isinstance(value, list) and value[0] is not None}
    return sorted(name for name in parts - {component} if name.isidentifier())
