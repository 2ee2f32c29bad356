"""One table of the files of a run, shared by all code that saves, deletes, copies, uploads or lists them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from .measurement import COMPARISON_FILE

__all__ = [
    *(
        "ABANDONED",
        "BEST_FOLDER",
        "CARD_FILE",
        "CONFIG_FILE",
        "EVIDENCE",
        "LOCK_FILE",
        "LORA_FILE",
        "LOGS",
        "PLAIN_FOLDER",
    ),
    *("PROFILE_FOLDER", "SETTINGS_FILE", "TABLE", "Left", "evidence_patterns", "files_left", "is_of_checkpoint"),
    *("VALIDATION_FILE", "VALIDATION_PICTURE", "not_data", "obstacle", "private_patterns", "shown_files"),
]

CARD_FILE = "README.md"
CONFIG_FILE = "reg_config.json"
SETTINGS_FILE = "reg_settings.yaml"  # written first: a folder that holds it is the folder of a run
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
LOCK_FILE = ".lock"
LOGS = ("metrics.jsonl", "bad_steps.jsonl")  # one line per step
PLAIN_FOLDER = "plain"
BEST_FOLDER = "best"
VALIDATION_FILE = "validation.json"
VALIDATION_PICTURE = "validation.png"
PROFILE_FOLDER = "profile"
_MARKS = {
    SETTINGS_FILE: "a training run",
    "evaluation_settings.json": "an evaluation",
    "sweep_settings.json": "a sweep",
}
ABANDONED = "abandoned-"  # prefix of the checkpoints and sample images of an abandoned branch

_LOGGING_DIR = "{logging_dir}"
TENSORBOARD_FOLDER = "train_reg"
_CHECKPOINT_FILES = (
    *("manifest.json", "counters_#.json", "random_states_#.pkl", "scaler.pt", "*.safetensors", "*.bin"),
    *("*.safetensors.index.json", "*.distcp", ".metadata", "*_states.pt", "latest", "zero_to_fp32.py"),
)


@dataclass(frozen=True)
class Left:
    """Files of one kind that a run leaves.

    In names, # stands for a number and * for any text.

    Attributes:
        folder: the folder below the output folder, "" for the output folder itself; a trailing /** includes all
            folders below.
        files: the names of the files.
        name: the label in the list at the end of a run; "" if not listed.
        uploaded: whether an upload of the run includes them.
        evidence: whether an upload of the pipeline alone includes them, if they describe its weights.
        deleted: whether --overwrite_output_dir deletes them.
        stale: which of them a resumed run invalidates: "all", those of "later" steps, or "" for none.
    """

    folder: str
    files: tuple[str, ...]
    name: str = ""
    uploaded: bool = True
    evidence: bool = True
    deleted: bool = True
    stale: str = ""


_NETWORK_FILES = (
    *("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-#-of-#.safetensors"),
    "diffusion_pytorch_model.safetensors.index.json",
)
# Of a text-to-image pipeline, besides its network and autoencoder.
_OF_TEXT = tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
_OF_TEXT += ("safety_checker", "feature_extractor", "image_encoder")
_FILES_OF_TEXT = ("*.json", "*.txt", "*.model", "*.safetensors")
_MODEL = {"evidence": False}
_PRIVATE = {"uploaded": False, "evidence": False}
_PIPELINE = (
    Left("", ("model_index.json", "pipeline.py"), "pipeline", **_MODEL),
    *(Left(name, _NETWORK_FILES, **_MODEL) for name in ("unet", "transformer", "vae")),
    *(Left(name, _FILES_OF_TEXT, **_MODEL) for name in _OF_TEXT),
    Left("", (LORA_FILE,), "adapters", **_MODEL),
    Left("vqvae", _NETWORK_FILES, **_MODEL),
    Left("scheduler", ("scheduler_config.json",), **_MODEL),
    Left(".pipeline/**", ("*",), **_PRIVATE),  # unfinished
)
_BEST = tuple(replace(left, folder=f"{BEST_FOLDER}/{left.folder}", name="", **_PRIVATE) for left in _PIPELINE)
_MAIN = (
    *_PIPELINE,
    Left(BEST_FOLDER, (), "best model", **_PRIVATE),
    *_BEST,
    Left("samples", ("step-#.png",), "samples", stale="later"),
    Left("", ("comparison.png",), "comparison", stale="all"),
    Left("", (COMPARISON_FILE,), stale="all"),
    Left("", ("evaluation.png",), "evaluation", stale="all"),
    Left("", (VALIDATION_PICTURE,), "validation", stale="all"),
    Left("", (VALIDATION_FILE,), stale="all"),
    Left("", (LOGS[0],), "metrics", stale="later"),
    Left("", (LOGS[1],), "bad steps", stale="later"),
    Left(PROFILE_FOLDER + "/**", ("trace.json",), "profile", **_PRIVATE),
    Left("", (CONFIG_FILE,)),
    Left(
        "", (SETTINGS_FILE,), "settings", deleted=False
    ),  # overwritten; without it, the folder would not be recognized
    Left("", (CARD_FILE,), deleted=False),  # it may hold text of the owner
    Left(f"{_LOGGING_DIR}/{TENSORBOARD_FOLDER}/**", ("events.out.tfevents.*", "hparams.yml"), "logs", **_PRIVATE),
    Left("checkpoint-#/**", _CHECKPOINT_FILES, **_PRIVATE),
    Left(f"{ABANDONED}checkpoint-#/**", (*_CHECKPOINT_FILES, *LOGS), deleted=False, **_PRIVATE),
    Left("samples", (f"{ABANDONED}step-#.png",), deleted=False, **_PRIVATE),
    # Unfinished files, which a killed run leaves.
    Left("", (LOCK_FILE,), deleted=False, **_PRIVATE),
    Left(".checkpoint-#/**", ("*",), **_PRIVATE),
    Left(".checkpoint-#.replaced/**", ("*",), **_PRIVATE),
    Left(".upload/**", ("*",), **_PRIVATE),
)
_PLAIN = tuple(replace(left, folder=f"{PLAIN_FOLDER}/{left.folder}", name="", **_PRIVATE) for left in _MAIN)
TABLE = (*_MAIN, Left(PLAIN_FOLDER, (), "plain model", **_PRIVATE), *_PLAIN)

# The files and folders below the output folder that hold evidence.
EVIDENCE = tuple(dict.fromkeys(left.folder or name for left in TABLE if left.evidence for name in left.files))


def files_left(folder: Path, wanted: Callable[[Left], bool], logging_dir: str = "logs") -> Iterator[Path]:
    """Yields the files in the folder of a run that match the wanted entries of `TABLE`.

    Does not follow links to folders. A temporary file of a killed run counts as the file that it was to become.

    Args:
        folder: the output folder.
        wanted: returns whether an entry is wanted.
        logging_dir: the logging folder of the run.
    """
    for left in filter(wanted, TABLE):
        for place in _places(folder, left.folder, logging_dir):
            for entry in os.scandir(place):
                is_file = entry.is_symlink() or not entry.is_dir(follow_symlinks=False)
                if is_file and any(_matches(name, pattern) for name in _names(entry.name) for pattern in left.files):
                    yield Path(entry.path)


def is_of_checkpoint(name: str) -> bool:
    """Whether a file in the folder of a checkpoint belongs to it by its name."""
    return any(_matches(name, pattern) for pattern in _CHECKPOINT_FILES)


def evidence_patterns() -> list[str]:
    """Returns the paths of evidence in a repository, as patterns for the Hub client."""
    return [_pattern(left, name) for left in TABLE if left.evidence for name in left.files]


def private_patterns(logging_dir: str = "logs") -> list[str]:
    """Returns the paths below the output folder that are not uploaded, as patterns for the Hub client."""
    patterns = []
    for left in TABLE:
        folder = "/".join(part for part, _ in _parts(left.folder, logging_dir))
        if left.uploaded or folder.startswith("."):
            continue
        if (top := folder.split("/")[0]) in (PLAIN_FOLDER, BEST_FOLDER):
            patterns.append(f"{top}/*")
        elif folder.endswith("/**"):
            patterns.append(_glob(folder.removesuffix("*")))
        else:
            patterns += [_pattern(left, name) for name in left.files if not name.startswith(".")]
    return list(dict.fromkeys([*patterns, ".*", "*/.*"]))


def shown_files(folder: Path) -> dict[str, Path]:
    """Returns the paths of the listed files of a run by label, whether they exist or not."""
    return {left.name: folder / (left.folder.removesuffix("/**") or left.files[0]) for left in TABLE if left.name}


def not_data(root: str) -> Callable[[str, bool], str | None]:
    """Returns a function that gives the reason why images at a path are no data, or None: a run generated them.

    Its arguments are the path and whether that is a folder.

    That applies to all images in a subfolder that holds a run or a measurement, and to the files of a run in the data
    folder itself.

    Args:
        root: the folder of the data.
    """
    root = os.path.abspath(root)
    is_run = os.path.isfile(os.path.join(root, SETTINGS_FILE))
    left = {os.fspath(path) for path in files_left(Path(root), lambda left: True)} if is_run else set()

    def reason(path: str, is_folder: bool) -> str | None:
        if path in left:
            return "are files of a training run"
        if not is_folder:
            return None
        for mark, what in _MARKS.items():
            if os.path.isfile(os.path.join(path, mark)):
                return f"are in {os.path.relpath(path, root).replace(os.sep, '/')}/, the folder of {what}"
        return None

    return reason


def obstacle(folder: Path, logging_dir: str = "logs") -> str | None:
    """Describes what prevents a run from writing all its files to this folder; None if nothing does.

    Such obstacles are a link out of the folder, a file in place of a folder, and a folder in place of a file.
    """
    root = os.path.realpath(folder)
    for left in TABLE:
        place = folder
        for part, is_pattern in _parts(left.folder.removesuffix("/**"), logging_dir):
            place = place / part
            if (is_pattern and "#" in part) or not os.path.lexists(place):
                break
            if problem := _leads_out(place, root):
                return problem
            if not place.is_dir():
                return f"{place} is a file, but a run needs a folder there: move it"
        else:
            for path in (place / name for name in left.files if not {"#", "*"} & set(name)):
                if problem := _leads_out(path, root):
                    return problem
                if path.is_dir():
                    return f"{path} is a folder, but a run needs a file there: move it"
    return None


def _leads_out(path: Path, root: str) -> str | None:
    if not path.is_symlink() or os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep):
        return None
    return f"{path} is a link out of the folder, and writing would follow it: remove the link"


def _parts(below: str, logging_dir: str) -> list[tuple[str, bool]]:
    """Returns the folder names in a pattern of the table, each with whether # and * are wildcards in it."""
    parts = []
    for part in below.split("/"):
        if part == _LOGGING_DIR:
            parts += [(name, False) for name in PurePath(logging_dir).parts]
        elif part:
            parts.append((part, True))
    return parts


def _places(folder: Path, below: str, logging_dir: str) -> Iterator[Path]:
    """Yields the folders that match a pattern of the table, without following links."""
    found = [folder] if folder.is_dir() else []
    for part, is_pattern in _parts(below, logging_dir):
        if part == "**":
            found = [Path(place) for top in found for place, *_ in os.walk(top)]
        else:
            found = [
                Path(entry.path)
                for place in found
                for entry in os.scandir(place)
                if entry.is_dir(follow_symlinks=False)
                and (_matches(entry.name, part) if is_pattern else entry.name == part)
            ]
    yield from found


def _names(name: str) -> tuple[str, ...]:
    """Returns the name of a file, and for a temporary file of `write_whole` also its final name."""
    unfinished = re.fullmatch(r"\.(.+)\.[0-9]+(\.[^.]*)?", name)
    return (name, unfinished[1] + (unfinished[2] or "")) if unfinished else (name,)


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\#", "[0-9]+").replace(r"\*", ".*"), name, re.DOTALL) is not None


def _pattern(left: Left, name: str) -> str:
    return _glob(f"{left.folder}/{name}" if left.folder else name)


def _glob(pattern: str) -> str:
    return pattern.replace("#", "*")
