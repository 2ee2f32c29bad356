"""PIDM's toy problem, points on a circle: steps per second of its own loop and of one through RegularizedLoss.

    python docs/benchmarks/toy_loop.py --pidm path/to/PhysicsInformedDiffusionModels

Your copy of PIDM (github.com/jhbastek/PhysicsInformedDiffusionModels, with einops and imageio installed) gives the
network, an MLP, the schedule and, for its side, the loss with mean estimation: x0-prediction, min-SNR-5 weights, and
-0.1 times the logarithm of the likelihood of the residual |x|^2 - 1. Ours is the same loss by a `Term`; that both give
the same number is checked first. Then they take turns on one thread, in blocks of 50 steps, and their CPU times are
compared, so that other programs on the machine matter little. "PIDM" does in a step what main_toy.py does, progress
bar and all, without wandb. "tight" is the same mathematics with nothing around it, neither checks nor records: as fast
as this network can be trained step by step. The last lines are the losses alone, without network and optimizer.

The result is printed and kept in toy_loop.txt beside this file.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from tqdm import tqdm

from reg_diffusers import RegularizedLoss, Term, weighting

BATCH, STEPS, BLOCK = 128, 100, 50
WEIGHT, LARGEST = 0.1, 27.6310211159  # of PIDM: a likelihood is no smaller than exp(-27.6), 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pidm", type=Path, required=True, help="your copy of PIDM's repository")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    sys.path.insert(0, str(args.pidm))
    from src import denoising_toy_utils as pidm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(10000, 2), dim=1)
    tables = pidm.create_diff_dict(STEPS, "cpu")
    check(pidm, tables, points)
    losses = {"ours": ours(tables, points), "tight": tight(tables, points)}
    loops = {"PIDM": theirs(pidm, tables, points)}
    loops |= {name: loop(pidm.ConditionalModel(2, STEPS), loss) for name, loss in losses.items()}
    found = {name: [] for name in loops}
    for _ in range(args.rounds + 1):
        for name, step in loops.items():
            start = time.process_time()
            for _ in range(BLOCK):
                step()
            found[name].append(BLOCK / (time.process_time() - start))
    lines = [f"torch {torch.__version__}, 1 thread, CPU time, {args.rounds} rounds of {BLOCK} steps, batch {BATCH}"]
    for name, rates in found.items():
        ratios = sorted(rate / other for rate, other in zip(rates[1:], found["PIDM"][1:], strict=True))
        lines.append(f"  {name:<6}{statistics.median(rates[1:]):6.0f} steps/s  {statistics.median(ratios):.2f} x PIDM"
                     f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip
    for name, times in alone(losses, args.rounds).items():
        lines.append(f"  {name:<6}the loss alone, {times[0]:.0f} us forward and {times[1]:.0f} us backward")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".txt").write_text(text)
    print("\n" + text)


def residual(points):
    return points.square().sum(1) - 1


def surprise(points, /, *, variance):
    """The negative logarithm of the likelihood of a residual of 0, without its constant."""
    return (residual(points).square() / (2 * variance)).clamp(max=LARGEST)


surprise.needs = ("variance",)


def loss_of(tables) -> RegularizedLoss:
    """PIDM's objective as a `RegularizedLoss`."""
    scheduler = DDPMScheduler(STEPS, trained_betas=tables["betas"].numpy(), prediction_type="sample")
    return RegularizedLoss(scheduler, [Term(surprise, WEIGHT, weighting.constant)], snr_gamma=5.0)


def pidm_loss(pidm, tables, model, batch):
    """PIDM's objective by its own function, with the parts that main_toy.py switches off by weights of 0."""
    return pidm.model_estimation_loss(
        model, batch, STEPS, tables, model_pred_mode="x0", c_residual=WEIGHT, residual_func=residual,
        ineq_func=lambda x: (torch.relu(x.abs().sum(1) - 1), None), opt_func=lambda x: x[:, 0],
    )  # fmt: skip


def check(pidm, tables, points) -> None:
    """That both sides compute the same loss at the same noise and timesteps."""
    model, batch, seen = pidm.ConditionalModel(2, STEPS), points[:BATCH], {}

    def watched(noisy_samples, timesteps):
        seen.update(noisy=noisy_samples, timesteps=timesteps)
        return model(noisy_samples, timesteps)

    expected = pidm_loss(pidm, tables, watched, batch)[0]
    timesteps = seen["timesteps"]
    alpha, sigma = (tables[name][timesteps, None] for name in ("alphas_bar_sqrt", "one_minus_alphas_bar_sqrt"))
    noise = (seen["noisy"] - alpha * batch) / sigma
    variance = tables["posterior_variance_clipped"][timesteps]
    found = loss_of(tables)(model, batch, noise=noise, timesteps=timesteps, variance=variance).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def theirs(pidm, tables, points):
    model = pidm.ConditionalModel(2, STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    bar = tqdm(total=1)

    def step():
        loss, *_ = pidm_loss(pidm, tables, model, draw(points))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_description(f"training loss: {loss.item():.4f}")

    return step


def ours(tables, points):
    loss_fn, variance = loss_of(tables), tables["posterior_variance_clipped"]

    def loss(model):
        timesteps = torch.randint(STEPS, (BATCH,))
        return loss_fn(model, draw(points), timesteps=timesteps, variance=variance[timesteps]).loss

    return loss


def tight(tables, points):
    alpha, sigma = tables["alphas_bar_sqrt"], tables["one_minus_alphas_bar_sqrt"]
    of_data, variance = tables["p2_loss_weight"], tables["posterior_variance_clipped"]

    def loss(model):
        batch, timesteps = draw(points), torch.randint(STEPS, (BATCH,))
        x0_hat = model(alpha[timesteps, None] * batch + sigma[timesteps, None] * torch.randn_like(batch), timesteps)
        denoising = (of_data[timesteps] * (x0_hat - batch).square().mean(1)).mean()
        return denoising + WEIGHT * surprise(x0_hat, variance=variance[timesteps]).mean()

    return loss


def alone(losses, rounds):
    """By name, the median CPU times of a loss and its backward pass in microseconds, for an output that is given."""
    output = torch.randn(BATCH, 2, requires_grad=True)
    found = {name: ([], []) for name in losses}
    for _ in range(rounds + 1):
        for name, loss in losses.items():
            start = time.process_time()
            made = [loss(lambda noisy_samples, timesteps: output) for _ in range(BLOCK)]
            between = time.process_time()
            for each in made:
                each.backward()
            end = time.process_time()
            for times, taken in zip(found[name], (between - start, end - between), strict=True):
                times.append(1e6 * taken / BLOCK)
    return {name: [statistics.median(times[1:]) for times in both] for name, both in found.items()}


def loop(model, loss_of_model):
    """A step of training as train_reg.py has it: fused optimizer, clipping of all gradients at once."""
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=5e-4, fused=True)

    def step():
        loss_of_model(model).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw(points):
    return points[torch.randint(len(points), (BATCH,))]


if __name__ == "__main__":
    main()
