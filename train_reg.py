"""Trains a diffusion model with L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat).

accelerate launch train_reg.py                                         # a demonstration of a few minutes
accelerate launch train_reg.py --train_data_dir photos --regularizer total_variation --reg_weight 0.1
accelerate launch train_reg.py --train_data_dir photos --regularizer my_module:MyReg --compare
"""

import sys
from functools import partial

import torch

from reg_diffusers import RegularizedLoss, draw_timesteps
from reg_diffusers.balancing import balance
from reg_diffusers.loss_weighting import DENSITIES, LOSS_WEIGHTINGS
from reg_diffusers.runtime.errors import exit_on_usage_error
from reg_diffusers.settings import Settings
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.batches import batches_of
from reg_diffusers.training.conflict_free import choose_backward
from reg_diffusers.training.monitors import Monitors
from reg_diffusers.training.opening import launched, open_run
from reg_diffusers.training.run import Run
from reg_diffusers.training.saves import Saves


@exit_on_usage_error
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    train(parse_args(argv), argv)


def train(settings: Settings, argv: list[str] | None = None):
    """Trains with the losses and, for a comparison, without them; saves, measures and uploads the models.

    Args:
        settings: settings of the run.
        argv: command line of the settings, for the commands that are printed; None: derived from the settings.

    Returns:
        The pipeline of the model trained with the losses; None if a signal ended the run earlier.

    Raises:
        UsageError: the run cannot work with these settings, data or losses. Nothing is written then.
    """
    pipeline = None
    with launched(settings, argv) as launch:
        run = open_run(launch)
        with run.interruption:
            pipeline, weights = fit(run, run.output_dir, run.terms)
            terms = run.weighted(weights)
            plain, _ = fit(run, run.plain_dir) if run.compares else (None, None)
            run.measure(pipeline, terms, plain)
        run.publish()
    return pipeline


def fit(run: Run, output_dir, terms=()):
    """Trains and saves one model. Its initial weights, batches and noise do not depend on the terms.

    Returns the pipeline, and the weights of the terms in the loss.
    """
    settings, data = run.settings, run.data
    training = run.prepare(output_dir)
    accelerator, unet, optimizer = training.accelerator, training.unet, training.optimizer
    progress, profile = training.progress, training.profile

    loss_fn = RegularizedLoss(
        training.noise_scheduler,
        terms,
        snr_gamma=settings.loss.snr_gamma,
        loss_weighting=LOSS_WEIGHTINGS[settings.loss.loss_weighting],
        max_nonfinite_steps=None,
        section=partial(profile, "auxiliary"),
    ).to(accelerator.device)
    needs, density = loss_fn.regularization.needs, DENSITIES[settings.loss.timestep_sampling]
    chosen = choose_backward(accelerator, training.network, settings.loss.reg_balance if terms else None)
    network = profile.around("forward", training.as_called(chosen.network))
    means_on_data, rules = run.means_on_data(terms), run.rules(terms)
    monitors = Monitors(
        training,
        output_dir,
        loss_fn.regularization,
        rules,
        means_on_data,
        settings.optimization,
        settings.output.checkpointing_steps,
        run.title(terms),
    )
    saves = Saves(run, training, monitors, output_dir)
    flips, dropout = settings.data.random_flip, settings.data.condition_dropout
    seed = settings.optimization.seed
    batches = batches_of(training, data, random_flip=flips, condition_dropout=dropout, crop_seed=seed)
    unet.train()
    with monitors.start(progress.step):
        while progress.step < training.max_train_steps:
            if accelerator.sync_gradients and run.interruption.agreed():
                break
            with profile("data"):
                batch = next(batches)
            noise = torch.randn_like(batch.original_samples)
            timesteps = draw_timesteps(training.noise_scheduler, len(noise), density)
            model, arguments = batch.given.bind(network)
            with accelerator.accumulate(unet):
                output = loss_fn(
                    model,
                    batch.original_samples,
                    noise=noise,
                    timesteps=timesteps,
                    model_kwargs={"return_dict": False, **arguments},
                    training_step=progress.step,
                    **batch.context.needed(needs),
                )
                with profile("auxiliary"):
                    output = balance(output, monitors.weights.current)
                loss = monitors.bad_steps.guard(output.loss, timesteps, batch.ids)
                with profile("backward"):
                    chosen.backward(loss, output)
                with profile("optimizer"):
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(training.trained, settings.optimization.max_grad_norm)
                        monitors.bad_steps.update(progress.step + 1, optimizer, norm)
                    optimizer.step()
                    optimizer.zero_grad()
            monitors.update(output)
            if not accelerator.sync_gradients:
                continue
            monitors.step()
            training.lr_scheduler.step()
            with profile("EMA"):
                if training.ema:
                    training.ema.step(training.trained)
            progress.step += 1
            monitors.print_lines(profile.step())

            problem = monitors.look(progress.step)
            monitors.write(progress.step)
            if problem:
                saves.stop(progress.step, problem)
            saves.save(progress.step)
        monitors.print_lines(profile.finish())

    # A comparison may be interrupted while its second model trains, after this one is finished.
    saves.finish(progress.step, is_resumed_later=bool(run.interruption or (settings.loss.compare and terms)))
    training.trackers.finish()
    return saves.pipeline, {name: float(weight) for name, weight in monitors.weights.current.items()}


if __name__ == "__main__":
    main()
