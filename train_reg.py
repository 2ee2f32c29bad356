"""Trains a diffusion model with L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat).

accelerate launch train_reg.py                                         # a demonstration, a few minutes
accelerate launch train_reg.py --train_data_dir photos --regularizer total_variation --reg_weight 0.1
accelerate launch train_reg.py --train_data_dir photos --regularizer my_module:MyReg --compare
"""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from tqdm.auto import tqdm

from reg_diffusers import RegularizedLoss, draw_timesteps, with_condition
from reg_diffusers.attention import use_explicit_attention
from reg_diffusers.balancing import balance
from reg_diffusers.card import write_card
from reg_diffusers.hub import Uploads, check_upload
from reg_diffusers.training.arguments import parse_args
from reg_diffusers.training.bad_steps import BadSteps
from reg_diffusers.training.checkpoint import Checkpoints, Progress, endless_batches
from reg_diffusers.training.checks import check_terms
from reg_diffusers.training.compiling import compile_for_training
from reg_diffusers.training.conflict_free import ConflictFree, check_balance
from reg_diffusers.training.data import flip_half, load_training_data, make_dataloader
from reg_diffusers.training.dropped_images import DroppedImages
from reg_diffusers.training.ema import build_ema
from reg_diffusers.training.engine import check_engine
from reg_diffusers.training.errors import UsageError, exit_on_usage_error
from reg_diffusers.training.gathering import SampledNetwork, whole
from reg_diffusers.training.hardware import choose_mixed_precision, keep_freed_memory, set_threads
from reg_diffusers.training.interruption import Interruption
from reg_diffusers.training.launch import resume_command
from reg_diffusers.training.loss_parts import LossParts
from reg_diffusers.training.metrics import MetricsLog, check_logger
from reg_diffusers.training.model import build_noise_scheduler, build_unet, choose_attention, load_given_model
from reg_diffusers.training.optimizer import build_lr_scheduler, build_optimizer
from reg_diffusers.training.output import prepare_output_dir, save_pipeline, write_settings
from reg_diffusers.training.preview import conditions_of, preview_conditions, sampling_pipeline, save_preview
from reg_diffusers.training.processes import in_turn, join_processes, leave_processes, on_main_process, together
from reg_diffusers.training.profiling import StepProfile
from reg_diffusers.training.record import record_weights, write_record
from reg_diffusers.training.report import compare, describe, describe_machine, describe_result
from reg_diffusers.training.settings import check_settings, mathematical_settings
from reg_diffusers.training.term_weights import MEASURED_STEPS, TermWeights
from reg_diffusers.training.terms import build_terms, check_rules, weight_rules, with_weights

LOG_INTERVAL = 10  # steps between two readings of the metrics; reading waits for an accelerator


@exit_on_usage_error
def main(argv=None):
    args = parse_args(argv)
    state = join_processes()
    check_engine(args, state)
    check_balance(args, state.distributed_type)
    mixed_precision, threads = choose_mixed_precision(args), set_threads(args)
    keeps_memory = keep_freed_memory(state.device)
    repo_id = on_main_process(state, lambda: check_upload(args))
    terms = together(state, lambda: build_terms(args))
    given, data = in_turn(state, lambda: load(args))
    # What cannot work is said here, before anything is written.
    noise_scheduler = build_noise_scheduler(args, given)
    on_data = together(state, lambda: check_terms(terms, noise_scheduler, data, state.device, mixed_precision))
    together(state, lambda: check_rules(weight_rules(args, terms), on_data))
    unet = build_unet(args, given, data)
    attention, attention_reason = choose_attention(args, unet, state.device, mixed_precision)
    check_logger(args)
    output_dir = Path(args.output_dir)
    on_main_process(state, lambda: prepare_output_dir(args))
    settings = mathematical_settings(args, data, state, mixed_precision, attention)
    on_main_process(state, lambda: check_settings(args, output_dir, settings))
    resume = resume_command(argv, state)
    uploads = on_main_process(state, lambda: Uploads(args, repo_id) if repo_id else None)
    if state.is_main_process:
        write_settings(args, output_dir)
        write_record(args, argv, state, data, noise_scheduler, terms, mixed_precision, output_dir)
        machine = describe_machine(args, state, threads, keeps_memory, mixed_precision, attention, attention_reason)
        print(describe(args, data, unet, noise_scheduler, terms, on_data, machine), flush=True)

    del given, unet
    with Interruption(state, args.max_train_time) as interruption:
        run = (args, data, settings, resume, interruption)
        pipeline, weights = train(*run, output_dir, terms, on_data, uploads)
        terms = with_weights(terms, weights)
        if state.is_main_process:
            record_weights(terms, output_dir)
        compared = args.compare and not interruption
        plain, _ = train(*run, output_dir / "plain") if compared else (None, None)
        interruption.stop_asking()
        leave_processes(state)
        if not state.is_main_process:
            return
        if (args.compare or uploads) and not interruption:
            compare(args, data, terms, plain, pipeline, output_dir)
    if not interruption:
        write_card(output_dir, repo_id or args.output_dir, uploads and uploads.old_card, args.hub_license)
    print(describe_result(args, output_dir, interruption, resume))
    if uploads:
        uploads.finish(output_dir, interrupted=bool(interruption))


def load(args):
    """The model to start from, and the data."""
    given = load_given_model(args)
    return given, load_training_data(
        args, given.channels, given.resolution, given.normalization, given.condition_channels
    )


def train(args, data, settings, resume, interruption, output_dir, terms=(), on_data=None, uploads=None):
    """Trains and saves one model; its weights, batches and noise are the same whatever its terms.

    Returns its pipeline, and the weights of its terms in the loss.
    """
    accelerator = Accelerator(
        mixed_precision=choose_mixed_precision(args),
        # A step is so many batches, across the end of an epoch too: each image counts as in a single larger batch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=args.logger,
        project_dir=output_dir / args.logging_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
    )
    if args.logger:
        accelerator.init_trackers("train_reg")
    set_seed(args.seed)
    given = load_given_model(args)
    noise_scheduler = build_noise_scheduler(args, given)
    unet = build_unet(args, given, data)
    if choose_attention(args, unet, accelerator.device, accelerator.mixed_precision)[0] == "explicit":
        use_explicit_attention(unet)
    if args.compile:
        compile_for_training(unet, args.train_batch_size)
    loss_fn = RegularizedLoss(noise_scheduler, terms, snr_gamma=args.snr_gamma, max_nonfinite_steps=None)
    loss_fn.to(accelerator.device)
    adamw = build_optimizer(args, unet)
    progress = Progress()
    dataloader = make_dataloader(args, data, accelerator, progress)
    unet, optimizer, dataloader = accelerator.prepare(unet, adamw, dataloader)
    ema = build_ema(args, unet)  # of what each process holds of the weights
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or math.ceil(
        args.num_epochs * len(dataloader) / args.gradient_accumulation_steps
    )
    means_on_data = {name: values.mean for name, values in (on_data or {}).items()}
    weights = TermWeights(accelerator, weight_rules(args, terms), means_on_data, args.lr_warmup_steps + MEASURED_STEPS)
    weights.check_length(max_train_steps)
    lr_scheduler = build_lr_scheduler(args, adamw, max_train_steps)

    set_seed(args.seed, device_specific=True)  # other noise on each process
    metrics = MetricsLog(accelerator, output_dir / "metrics.jsonl")
    bad_steps = BadSteps(accelerator, output_dir / "bad_steps.jsonl", args.max_bad_steps)
    regularization = loss_fn.regularization
    dropped = DroppedImages(accelerator, regularization.nonfinite, regularization.names, args.max_bad_steps)
    loss_parts = LossParts(accelerator, regularization.names, means_on_data)
    conflict_free = ConflictFree(accelerator, unet, args.reg_balance) if args.reg_balance and terms else None
    profile = StepProfile(accelerator, args.profile, output_dir)
    network = profile.around("forward", conflict_free.network if conflict_free else unet)
    regularization.at_level = profile.around("auxiliary", regularization.at_level)
    balanced = profile.around("auxiliary", balance)
    counters = {"metrics": metrics, "loss_parts": loss_parts, "bad_steps": bad_steps, "nonfinite": dropped}
    if args.streaming:
        counters["stream"] = dataloader.batch_sampler
    states = {"progress": progress, "lr_scheduler": lr_scheduler, **({"ema": ema} if ema else {})}
    if weights.names:
        states["term_weights"] = weights
    checkpoints = Checkpoints(
        accelerator, output_dir, states, settings, args.checkpoints_total_limit, counters, resume
    )
    checkpoints.resume(args)
    for log in (metrics, bad_steps):
        log.forget_later_than(progress.step)
    preview_steps = args.preview_steps or args.save_images_epochs * steps_per_epoch
    save_model_steps = args.save_model_epochs * steps_per_epoch
    sampled = SampledNetwork(accelerator, unet, ema)
    pipeline = sampling_pipeline(sampled.unet, noise_scheduler, data)
    shown = preview_conditions(data, args.eval_batch_size)
    bar = tqdm(
        desc=" + ".join(["denoising", *regularization.names]),
        total=max_train_steps,
        initial=progress.step,
        disable=not accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    unet.train()
    batches = endless_batches(accelerator, dataloader, progress)
    with bar:
        while progress.step < max_train_steps:
            if accelerator.sync_gradients and interruption.agreed():
                break
            with profile("data"):
                batch = next(batches)
                original_samples = data.normalization.normalize(batch["values"])
                conditions = conditions_of(data, batch)
                if args.random_flip:
                    original_samples, conditions = flip_half(original_samples, conditions)
            model = with_condition(network, conditions.get("condition"))
            labels = {"class_labels": conditions["class_labels"]} if args.class_conditional else {}
            noise = torch.randn_like(original_samples)
            timesteps = draw_timesteps(noise_scheduler, len(original_samples))
            with accelerator.accumulate(unet):
                output = balanced(
                    loss_fn(
                        model,
                        original_samples,
                        noise=noise,
                        timesteps=timesteps,
                        model_kwargs={"return_dict": False, **labels},
                        **conditions,
                    ),
                    weights.current,
                )
                loss = bad_steps.spread(output.loss, timesteps, batch["ids"])
                with profile("backward"):
                    if conflict_free:
                        conflict_free.backward(loss, output)
                    else:
                        accelerator.backward(loss)
                with profile("optimizer"):
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                        bad_steps.mark(progress.step + 1, optimizer, whole(gradient_norm))
                    optimizer.step()
                    optimizer.zero_grad()
            metrics.add({"loss": output.loss, **output.terms})
            loss_parts.add(output)
            weights.add(output)
            if not accelerator.sync_gradients:
                continue
            dropped.mark()
            for line in weights.update():
                bar.write(line)
            lr_scheduler.step()
            with profile("EMA"):
                if ema:
                    ema.step(unet.parameters())
            progress.step += 1
            bar.update()
            for line in profile.step():
                bar.write(line)

            is_last, is_checkpoint = progress.step == max_train_steps, progress.step % args.checkpointing_steps == 0
            is_logged = is_last or progress.step % LOG_INTERVAL == 0
            is_looked_at = is_logged or is_checkpoint
            if is_looked_at:
                dropped.look()
                for line in bad_steps.look():
                    bar.write(line)
            if is_logged:
                means = metrics.write(
                    progress.step,
                    lr=lr_scheduler.get_last_lr()[0],
                    bad_steps=bad_steps.count,
                    **dropped.counts(),
                    **loss_parts.read(),
                    **weights.metrics(),
                )
                accelerator.log(means, step=progress.step)
                bar.set_postfix({name: f"{means[name]:.4f}" for name in output.terms})
            if is_looked_at and (problem := bad_steps.advice() if bad_steps.too_many else dropped.problem()):
                checkpoints.save(progress.step, bar.write)
                raise UsageError(problem)
            if progress.step % preview_steps == 0 or is_last:
                with sampled.ready():
                    path = output_dir / "samples" / f"step-{progress.step:06d}.png"
                    save_preview(accelerator, pipeline, shown, path, args, progress.step, terms, means_on_data)
            if progress.step % save_model_steps == 0:
                with sampled.ready():
                    if accelerator.is_main_process:
                        save_pipeline(pipeline, output_dir)
            if is_checkpoint:
                checkpoints.save(progress.step, bar.write)
                if args.hub_strategy == "checkpoint" and not is_last:
                    with sampled.ready():
                        if uploads:
                            uploads.in_background(pipeline, output_dir, progress.step)

        for line in profile.finish():
            bar.write(line)

    # A comparison may be interrupted in its second half, when this model is done.
    if (interruption or (args.compare and terms)) and progress.step % args.checkpointing_steps:
        bad_steps.look()
        dropped.look()
        checkpoints.save(progress.step)
    sampled.finish()
    if accelerator.is_main_process:
        save_pipeline(pipeline, output_dir)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return pipeline, {name: float(weight) for name, weight in weights.current.items()}


if __name__ == "__main__":
    main()
