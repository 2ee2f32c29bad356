"""Draws the missing samples of a store, divided among any number of processes."""

from __future__ import annotations

from accelerate import PartialState
from tqdm import tqdm

from ..runtime.messages import bars_are_hidden
from .sampler import Sampler
from .settings import SampleSettings
from .store import SampleStore

__all__ = ["draw_missing", "find_missing"]


def find_missing(store: SampleStore, settings: SampleSettings, number: int) -> list[int]:
    """Returns the indices of the missing ones among the first `number` samples; changes nothing.

    Raises:
        ValueError: if the path holds something else or samples of other settings; the message begins with the path.
    """
    if not store.settings_file.is_file():
        if store.holds_others():
            raise ValueError(f"{store.path} exists and holds no known samples: name another path")
        return list(range(number))
    present = store.present()
    if not present:
        return list(range(number))
    if differences := settings.differences(SampleSettings.load(store.settings_file)):
        raise ValueError(f"{store.path} holds samples drawn with {', '.join(differences)}: name another path")
    return sorted(set(range(number)) - present)


def draw_missing(
    sampler: Sampler, store: SampleStore, missing: list[int], batch_size: int, state: PartialState
) -> None:
    """Draws the missing samples into the store; a progress bar shows the share of the main process.

    Call it in all processes; it returns when all are done. After that, one process must call `store.finish`.

    Args:
        sampler: the sampler.
        store: the store to write to.
        missing: the result of `find_missing`.
        batch_size: samples per batch in each process.
        state: the state of the processes.
    """
    state.wait_for_everyone()  # no process writes before all have searched the store
    if state.is_main_process:
        store.prepare()
        sampler.settings.save(store.settings_file)
    state.wait_for_everyone()
    share = missing[state.process_index :: state.num_processes]
    among = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with tqdm(
        total=len(share),
        desc=f"sampling{among}",
        unit="image",
        dynamic_ncols=True,
        disable=not state.is_main_process or bars_are_hidden(),
    ) as progress:
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            samples = sampler.draw(indices, _advance(progress, start, len(indices)))
            for index, sample in zip(indices, samples, strict=True):
                store.write(index, sample)
    state.wait_for_everyone()


def _advance(progress: tqdm, before: int, number: int):
    """Returns a callback that moves the bar at each step of a batch: half of the steps count as half of the images."""

    def after_step(pipeline, index: int, timestep, tensors: dict) -> None:
        share = (index + 1) / len(pipeline.scheduler.timesteps)
        progress.update(before + int(share * number) - progress.n)

    return after_step
