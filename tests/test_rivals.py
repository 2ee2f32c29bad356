"""The benchmark of rival methods trains many networks at once, and each as if it were alone."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers import weighting

pytestmark = pytest.mark.project

SEEDS = (0, 1)


@pytest.fixture
def rivals(monkeypatch):
    """The modules of the benchmark, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "benchmarks" / "rivals"))
    import circle
    import ensemble
    import methods

    yield {"circle": circle, "ensemble": ensemble, "methods": methods}
    for name in ("circle", "ensemble", "methods"):
        del sys.modules[name]


def gradients(rivals, methods, seeds, drawn):
    """Gradients of each member by kind, clipped, with the members in the order of methods and seeds."""
    circle, ensemble = rivals["circle"], rivals["ensemble"]
    scheduler = DDPMScheduler(
        circle.STEPS, trained_betas=circle.cosine_betas().float().numpy(), prediction_type="sample"
    )
    found = []
    for loss_fn, chosen in rivals["methods"].groups(methods, seeds, scheduler, circle.residual, circle.GAMMA):
        network = ensemble.StackedMLP(list(seeds) * len(chosen), 2, 8, circle.STEPS).double()
        points, noise, timesteps = (part.repeat(len(chosen), *[1] * (part.ndim - 1)) for part in drawn)
        output = loss_fn(network, points.double(), noise=noise.double(), timesteps=timesteps)
        (network.members * output.loss).backward()
        ensemble.clip_by_member(network, 0.1)
        found += zip(*(parameter.grad for parameter in network.parameters()), strict=True)
    return found


def test_a_member_of_an_ensemble_has_the_gradient_of_a_training_alone(rivals):
    circle, methods = rivals["circle"], rivals["methods"]
    rows = (
        methods.Method("plain"),
        methods.Method("matched", 5, weighting=weighting.matched),
        methods.Method("constant", 1, weighting=weighting.constant),
        methods.Method(methods.MEAN, 0.1, methods.MEAN),
        methods.Method(methods.SAMPLE, 0.005, methods.SAMPLE),
    )
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    data = torch.stack([torch.stack([angle.cos(), angle.sin()], 1) for angle in map(circle.weighted, streams)])
    drawn = circle.draw(data, torch.arange(12).repeat(2, 1), streams)
    together = gradients(rivals, rows, SEEDS, drawn)
    assert len(together) == len(rows) * len(SEEDS)
    halves = [tuple(part.chunk(2)[place] for part in drawn) for place in range(2)]
    alone = [gradients(rivals, [row], [seed], halves[seed])[0] for row in rows for seed in SEEDS]
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert all((one[0] - other[0]).abs().max() > 1e-6 for one, other in zip(together[:2], together[2:4], strict=True))


def test_the_arc_of_the_small_mode_holds_its_share_of_the_points(rivals):
    circle = rivals["circle"]
    low, high = circle.small_mode()
    angles = circle.weighted(torch.Generator().manual_seed(0)) % (2 * torch.pi)
    assert low < 2.5 < high
    assert ((angles > low) & (angles < high)).float().mean().item() == pytest.approx(0.298, abs=0.015)
