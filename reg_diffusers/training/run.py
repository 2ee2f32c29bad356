"""What the trainings of one run of train_reg.py share, and what is measured and uploaded after them.

with launched(settings) as launch:  # of opening.py
    run = open_run(launch)
    with run.interruption:
        ...  # one training with the terms of the run and, for a comparison, one without
        run.measure(pipeline, terms, plain)
    run.publish()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState

from ..data.training_data import TrainingData
from ..hub.lora_card import write_card_of_run
from ..hub.uploads import Uploads
from ..networks.computation import Computation
from ..pipeline import RegDDPMPipeline
from ..runs.run_folder import CARD_FILE, PLAIN_FOLDER
from ..runtime.interruption import Interruption
from ..runtime.processes import leave_processes
from ..settings import Settings
from ..term import Term
from ..trial.checks import OnData
from ..weight_rules import WeightRule
from .ending import Ending
from .loading import Loaded
from .preparation import Training, prepare
from .record import record_weights
from .report import compare, describe_result
from .terms import of_images, weight_rules, with_weights
from .trackers import Trackers

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """Shared parts of the trainings of one run.

    Attributes:
        settings: settings of the run; the number of sampling steps is at most that of the noise schedule.
        state: processes of the launch.
        loaded: model to start from, and the data.
        terms: terms of the loss.
        on_data: L' of each term on the data, by name.
        computation: precision and attention of the network.
        mathematics: settings that a resumed run must share, by flag.
        ending: keeps failures beside the training from costing a trained model.
        interruption: whether the run must end before its last step; a context manager that handles signals.
        uploads: uploads to the Hub by the main process; None without uploads.
        repo_id: repository of the uploads.
        loggers: those of the trainings so far; the first one gets the comparison.
    """

    settings: Settings
    state: PartialState
    loaded: Loaded
    terms: tuple[Term, ...]
    on_data: dict[str, OnData]
    computation: Computation
    mathematics: dict
    ending: Ending
    interruption: Interruption
    uploads: Uploads | None
    repo_id: str | None
    loggers: list[Trackers] = field(default_factory=list)

    @property
    def data(self) -> TrainingData:
        """The data as the network sees them."""
        return self.loaded.data

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output.output_dir)

    @property
    def plain_dir(self) -> Path:
        """The folder of the model without terms that --compare trains."""
        return self.output_dir / PLAIN_FOLDER

    @property
    def compares(self) -> bool:
        """Whether to train a model without terms now; an interrupted run leaves it to the next start."""
        return self.settings.loss.compare and not self.interruption

    def prepare(self, output_dir: Path) -> Training:
        """Builds one training; each call gives the same."""
        settings = self.settings
        training = prepare(
            self.data,
            output_dir,
            self.ending,
            model=settings.model,
            optimization=settings.optimization,
            machine=settings.machine,
            computation=self.computation,
            output=settings.output,
            has_no_class=settings.data.has_no_class,
            cache_dir=settings.data.cache_dir,
            workers=settings.data.dataloader_num_workers,
            hyperparameters=settings.kept(),
        )
        self.loggers.append(training.trackers)
        return training

    def rules(self, terms: tuple[Term, ...]) -> dict[str, WeightRule]:
        """Returns the rule that sets the weight of each of these terms, by name."""
        return weight_rules(self.settings.loss, terms)

    def title(self, terms: tuple[Term, ...]) -> str:
        """Returns what the progress bar of the training with these terms begins with."""
        if not (self.settings.loss.compare and self.terms):
            return "training"
        names = " + ".join(term.name for term in self.terms)
        return f"training 1 of 2, with {names}" if terms else f"training 2 of 2, without {names}"

    def means_on_data(self, terms: tuple[Term, ...]) -> dict[str, float]:
        """Returns the mean of L' of these terms on the data, by name."""
        return {term.name: self.on_data[term.name].mean for term in terms}

    def weighted(self, weights: dict[str, float]) -> tuple[Term, ...]:
        """Returns the terms with the weights that their rules determined, and writes the weights to the record."""
        terms = with_weights(self.terms, weights)
        if self.state.is_main_process:
            work = partial(record_weights, terms, self.output_dir)
            self.ending.attempt("the record", "repair reg_config.json", work)
        return terms

    def measure(self, pipeline: RegDDPMPipeline, terms: tuple[Term, ...], plain: RegDDPMPipeline | None) -> None:
        """Measures the models on the main process; a signal stops it. The other processes leave."""
        self.interruption.stop_asking()
        leave_processes(self.state)
        is_measured = self.settings.loss.compare or self.uploads
        if self.state.is_main_process and is_measured and not self.interruption:
            compare(
                self.loaded.images,
                self.data,
                self.settings.loss,
                of_images(terms),
                plain,
                pipeline,
                self.output_dir,
                self.interruption,
                self.ending,
                self.loggers[0],
                seed=self.settings.optimization.seed,
                steps=self.settings.output.ddpm_num_inference_steps,
            )

    def publish(self) -> None:
        """Writes the card, prints where the files are, and uploads them, on the main process."""
        self.ending.is_stopped = bool(self.interruption)
        if not self.state.is_main_process:
            return
        output_dir, uploads = self.output_dir, self.uploads
        if not self.interruption:
            name = self.repo_id or self.settings.output.output_dir
            license = self.settings.hub.hub_license
            card = partial(write_card_of_run, output_dir, name, uploads and uploads.old_card, license)
            self.ending.attempt(f"{output_dir / CARD_FILE}", "--resume auto writes it again", card)
        print(describe_result(output_dir, self.interruption, self.ending.command))
        if uploads and not uploads.finish(output_dir, interrupted=bool(self.interruption)):
            self.ending.failures.append("the upload")
