"""Opens a run of train_reg.py: everything is checked before anything is written, then said in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..data.parts import parts_of
from ..data.training_data import StreamedLatents, TrainingData, Wanted, batches_per_epoch
from ..hub.uploads import Uploads, check_upload
from ..networks.autoencoders import cast_decoder, decoded_view
from ..networks.build import GivenModel, build_unet, learning_rate_of
from ..networks.computation import Computation, choose_computation
from ..networks.conditions import Conditions
from ..networks.noise_schedule import build_noise_scheduler
from ..runs.lineage import find_checkpoint
from ..runs.manifest import read_manifest
from ..runtime.engine import check_engine
from ..runtime.errors import UsageError
from ..runtime.hardware import allow_tf32, choose_mixed_precision, frozen_precision, keep_freed_memory, set_threads
from ..runtime.interruption import Interruption
from ..runtime.launch import resume_command
from ..runtime.messages import say, show_messages
from ..runtime.processes import in_turn, join_processes, on_main_process, together
from ..settings import Settings
from ..settings.advice import advise
from ..settings.arguments import as_flags
from ..settings.output import OutputSettings
from ..trial.checks import check_terms
from .conflict_free import check_balance
from .ending import Ending, ended_well
from .estimate import describe_needs, number_of_steps
from .held_out import hold_out
from .loading import Loaded, load_model_and_data
from .metrics import check_logger
from .notes import notes_on
from .optimizer import check_optimizer
from .output import claim_output_dir, remove_earlier_run, write_settings
from .preview import inference_steps
from .record import record_of_data, record_of_objective, recorded_command, write_record
from .report import describe, describe_machine
from .run import Run
from .settings import check_settings, mathematical_settings
from .term_weights import measured_steps
from .terms import build_terms, check_rules, check_schedules, in_units, wanted_columns, weight_rules

__all__ = ["Launch", "launched", "open_run"]


@dataclass(frozen=True)
class Launch:
    """One start of a run, before its data and model are loaded.

    Attributes:
        settings: settings of the run.
        argv: flags for the printed commands.
        state: processes of the launch.
        ending: ending of the run.
        held: resources released at the end, such as the lock of the output folder.
    """

    settings: Settings
    argv: list[str]
    state: PartialState
    ending: Ending
    held: ExitStack


@contextmanager
def launched(settings: Settings, argv: list[str] | None = None) -> Iterator[Launch]:
    """Joins the processes. Inside, a signal ends the run with status 0 and prints the command that continues.

    Args:
        settings: settings of the run.
        argv: flags as typed, for the printed commands; None: derived from the settings.
    """
    argv = as_flags(settings) if argv is None else argv
    show_messages(quiet=settings.output.quiet, verbose=settings.output.verbose)
    state = join_processes()
    with ended_well(argv, state) as ending, ExitStack() as held:
        yield Launch(settings, argv, state, ending, held)


def open_run(launch: Launch) -> Run:
    """Checks everything before any write, claims the output folder, and prints what will be trained.

    Raises:
        UsageError: the run cannot work with these settings, data, losses or output folder.
    """
    settings, argv, state, ending = launch.settings, launch.argv, launch.state, launch.ending
    loss, optimization, machine, output = settings.loss, settings.optimization, settings.machine, settings.output
    check_engine(state, machine.mixed_precision, machine.compile, optimization.max_grad_norm)
    check_optimizer(optimization, state.distributed_type)
    check_balance(loss, machine.compile, state.distributed_type)
    set_threads(machine.num_threads)
    keeps_memory, uses_tf32 = keep_freed_memory(state.device), allow_tf32(state.device, machine.mixed_precision)
    likely_precision = choose_mixed_precision(machine.mixed_precision)
    repo_id = on_main_process(state, lambda: check_upload(settings.hub, output.output_dir))
    terms = together(state, lambda: build_terms(loss, settings.data))
    wanted = together(state, lambda: wanted_columns(terms, settings.data))
    with_images = any("original_samples" in term.needs for term in terms)
    loaded = in_turn(state, lambda: _load(settings, state, wanted, with_images=with_images))
    given, data, vae = loaded.given, loaded.data, loaded.vae
    _check_length(data, settings.data.source, optimization.max_train_steps)
    decoder = None if vae is None else decoded_view(vae, likely_precision)
    terms = in_units(terms, data, loss.reg_units, decoder)
    # Errors are reported here, before anything is written.
    noise_scheduler = build_noise_scheduler(settings.model, given.scheduler)
    steps = inference_steps(output.ddpm_num_inference_steps, noise_scheduler)
    is_default_rate = optimization.learning_rate is None
    if is_default_rate:
        optimization = replace(optimization, learning_rate=learning_rate_of(given, data))
    output = replace(output, ddpm_num_inference_steps=steps)
    settings = replace(settings, optimization=optimization, output=output)
    advise(loss.snr_gamma, noise_scheduler)
    on_data = together(state, lambda: check_terms(terms, noise_scheduler, data, state.device, likely_precision))
    together(state, lambda: check_rules(weight_rules(loss, terms), on_data))
    together(state, lambda: check_schedules(terms, weight_rules(loss, terms), measured_steps(optimization)))
    unet = build_unet(machine, given, data, has_no_class=settings.data.has_no_class)
    check_logger(output.logger)
    on_main_process(state, lambda: launch.held.enter_context(claim_output_dir(output)))
    computation = on_main_process(state, lambda: _computation(settings, given, data, unet, state))
    (computation,) = broadcast_object_list([computation])
    mathematics = mathematical_settings(settings, data, state, computation.recorded)
    mathematics |= loaded.frozen_parts()
    batches = batches_per_epoch(data, optimization.train_batch_size, state.num_processes)
    on_main_process(state, lambda: check_settings(output, optimization, mathematics, batches))
    ending.command = resume_command(argv, state)
    is_adapter = settings.model.lora_rank is not None
    uploads = on_main_process(state, lambda: repo_id and Uploads(settings.hub, repo_id, output, is_adapter=is_adapter))
    if state.is_main_process:
        folder = Path(output.output_dir)
        remove_earlier_run(output)
        write_settings(settings, folder)
        write_record(
            folder,
            state,
            command=recorded_command(argv, state, machine, computation.recorded),
            seed=optimization.seed,
            mixed_precision=computation.mixed_precision.value,
            base_model=settings.model.pretrained_model_name_or_path,
            vae=settings.model.vae,
            data=record_of_data(settings.data, loaded),
            objective=record_of_objective(
                *(loss, terms, noise_scheduler), is_picture=data.is_picture, is_decoded=vae is not None
            ),
        )
        lines = describe_machine(machine, state, computation, keeps_memory, uses_tf32, len(parts_of(data)))
        data_and_model = data, loaded.images, settings.data.source, unet, noise_scheduler
        estimates = describe_needs(
            settings, state, data, given, unet, noise_scheduler, terms, computation, loaded.bytes_beside
        )
        held_out = loaded.held_out and loaded.held_out.describe()
        precision = computation.mixed_precision.value
        notes = notes_on(settings, loaded, unet, noise_scheduler, precision)
        if is_default_rate:
            notes.append(f"learning rate {optimization.learning_rate:g} by default; --learning_rate sets it")
        described = describe(
            *data_and_model, loss, terms, on_data, estimates, lines, output.output_dir, held_out, notes
        )
        say(described)
    interruption = Interruption(state, output.max_train_time)
    loaded = replace(loaded, given=replace(given, unet=None))  # frees the network; each training loads its own
    of_data = loaded, terms, on_data
    return Run(settings, state, *of_data, computation, mathematics, ending, interruption, uploads, repo_id)


def _load(settings: Settings, state: PartialState, wanted: list[Wanted], *, with_images: bool) -> Loaded:
    """Loads model and data.

    Raises:
        UsageError: they do not fit each other or the settings.
    """
    frozen, shown = frozen_precision(settings.machine.mixed_precision), settings.output.validation_prompts
    given = settings.model, settings.data, state.device, shown, frozen, wanted
    loaded = load_model_and_data(*given, with_images=with_images)
    loaded = hold_out(loaded, settings.validation, settings.data, settings.optimization.seed, wanted)
    if loaded.family is not None and not isinstance(loaded.data, StreamedLatents):  # which still encodes
        cast_decoder(loaded.vae, frozen)
    return replace(loaded, see=None)  # frees the text encoders


def _computation(settings: Settings, given: GivenModel, data: TrainingData, unet, state: PartialState) -> Computation:
    """Chooses how to compute the network; only the batches of the run decide whether it is worth a measurement."""
    optimization, loss = settings.optimization, settings.loss
    steps, _ = number_of_steps(optimization, data, state.num_processes)
    batches = steps * optimization.gradient_accumulation_steps
    if loss.compare and loss.regularizer:
        batches *= 2

    def call(network, images: int):
        samples = torch.randn(images, *data.shape)
        model, arguments = Conditions.for_previews(data, images).bind(given.as_called(network, data))
        return model(samples, torch.randint(0, 1000, (images,)), return_dict=False, **arguments)[0]

    return choose_computation(
        settings.machine,
        unet,
        state.device,
        batch_size=optimization.train_batch_size,
        batches=batches,
        earlier=lambda: _earlier_precision(settings.output),
        call=call,
    )


def _earlier_precision(output: OutputSettings) -> str | None:
    resumed = find_checkpoint(output, Path(output.output_dir))
    return read_manifest(resumed)["settings"].get("--mixed_precision") if resumed else None


def _check_length(data: TrainingData, source: str | None, max_train_steps: int | None) -> None:
    if data.number is None and max_train_steps is None:
        raise UsageError(f"--streaming: the number of images of {source} is unknown: give --max_train_steps")
