"""Samples in large numbers, each the same whatever it is drawn with.

In Python it takes a pipeline on its device, and no command line:

    settings = Settings(model_sha256=fingerprint(pipeline), scheduler="DDIM", num_inference_steps=50)
    store = PictureFolder(Path("samples"))
    missing = find_missing(store, settings, 10000)
    draw_missing(Sampler(pipeline, settings), store, missing, batch_size=64, state=PartialState())
"""

from .drawing import draw_missing, find_missing
from .sampler import Sampler, fingerprint
from .settings import Settings
from .store import ArrayFile, PictureFolder, SampleStore

__all__ = [
    "ArrayFile",
    "PictureFolder",
    "SampleStore",
    "Sampler",
    "Settings",
    "draw_missing",
    "find_missing",
    "fingerprint",
]
