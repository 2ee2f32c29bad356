"""Draws what is missing of a number of samples, shared by any number of processes."""

from __future__ import annotations

from accelerate import PartialState
from tqdm import tqdm

from .sampler import Sampler
from .settings import Settings
from .store import SampleStore

__all__ = ["draw_missing", "find_missing"]


def find_missing(store: SampleStore, settings: Settings, number: int) -> list[int]:
    """Which of the first `number` samples are not there yet; changes nothing.

    Raises:
        ValueError: something else is there, or samples of other settings; the message begins with the path.
    """
    if not store.settings_file.is_file():
        if store.holds_others():
            raise ValueError(f"{store.path} is there and not known to hold samples: name another")
        return list(range(number))
    present = store.present()
    if not present:
        return list(range(number))
    if differences := settings.differences(Settings.load(store.settings_file)):
        raise ValueError(f"{store.path} holds samples that were drawn with {', '.join(differences)}: name another")
    return sorted(set(range(number)) - present)


def draw_missing(
    sampler: Sampler, store: SampleStore, missing: list[int], batch_size: int, state: PartialState
) -> None:
    """Draws the missing samples into the store, with a bar that shows the main process's share of them.

    Called by all processes, and returns when all are done; `store.finish` is then for one of them.

    Args:
        sampler: draws them.
        store: takes them.
        missing: what `find_missing` found.
        batch_size: samples drawn at a time by each process.
        state: of the processes.
    """
    state.wait_for_everyone()  # nobody writes before all have looked
    if state.is_main_process:
        store.prepare()
        sampler.settings.save(store.settings_file)
    state.wait_for_everyone()
    share = missing[state.process_index :: state.num_processes]
    among = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with tqdm(
        total=len(share), desc=f"sampling{among}", unit="image", dynamic_ncols=True, disable=not state.is_main_process
    ) as progress:
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            samples = sampler.draw(indices, _advance(progress, start, len(indices)))
            for index, sample in zip(indices, samples, strict=True):
                store.write(index, sample)
    state.wait_for_everyone()


def _advance(progress: tqdm, before: int, number: int):
    """A callback that moves the bar at each step of a batch: half of the steps count as half of the images."""

    def after_step(pipeline, index: int, timestep, tensors: dict) -> None:
        share = (index + 1) / len(pipeline.scheduler.timesteps)
        progress.update(before + int(share * number) - progress.n)

    return after_step
