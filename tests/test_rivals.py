"""The benchmark of rival methods trains many networks at once, and each as if it were alone."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers import Term, conflict_free, noise_level, weighting
from reg_diffusers.regularizers import physics, total_variation

pytestmark = pytest.mark.project

SEEDS = (0, 1)
FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks" / "rivals"


@pytest.fixture
def rivals(monkeypatch):
    """The modules of the benchmark, by name."""
    names = (
        "circle",
        "ensemble",
        "methods",
        "fields",
        "heat",
        "darcy",
        "picture_data",
        "pictures",
        "kept",
        "predictions",
    )
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
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


@pytest.mark.parametrize("steps", [1, 2])
def test_a_member_trained_with_pbfm_has_the_gradient_of_a_training_alone(rivals, steps):
    fields, ensemble, heat = rivals["fields"], rivals["ensemble"], rivals["heat"]
    method = rivals["methods"].Method("PBFM", 1, rivals["methods"].PBFM)
    loss_fn = fields.losses(method, heat.residual)[steps - 1]
    data = heat.fields(8, 0).double()
    generator = torch.Generator().manual_seed(0)
    images = data[torch.randint(8, (6,), generator=generator)]
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    times = torch.rand(6, generator=generator)

    def gradients(seeds, rows):
        network = fields.Network(seeds, data.shape[1:], 8).double()
        output = loss_fn(
            fields.model(network, method), images[rows], noise=noise[rows], timesteps=times[rows].double()
        )
        return network, output

    def step(network):
        torch.optim.SGD(network.parameters(), lr=1.0, fused=True).step()

    network, output = gradients(SEEDS, slice(0, 6))
    ensemble.conflict_free_by_member(network, output)
    step(network)
    for place, seed in enumerate(SEEDS):
        alone, output = gradients([seed], slice(3 * place, 3 * place + 3))
        conflict_free.backward(output, alone.parameters())
        step(alone)
        for one, other in zip(network.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad[place], other.grad[0], rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(one[place], other[0], rtol=1e-6, atol=1e-6)
            assert other.grad.abs().max() > 1e-6


def test_the_fields_of_the_heat_family_obey_its_law_and_reveal_their_parameters(rivals):
    heat = rivals["heat"]
    square = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    known = heat.parameters(square)
    fields = heat.solutions(known)
    assert heat.residual(fields).abs().max() < 1e-3
    assert heat.residual(fields + fields.roll(1, 0)).abs().mean() > 0.01  # a sum of two diffusivities is no solution
    found = heat.recovered(fields + 0.1 * (2 * heat.PLACES).sin())  # orthogonal to all solutions
    assert (found - known).abs().max() < 0.03
    moved = known + torch.tensor([0.4, 0.0])  # a tenth of the range of nu
    assert heat.wasserstein(moved[torch.randperm(20)], known) <= 0.1 + 1e-6
    assert heat.wasserstein(known, known) == 0


def test_the_residual_of_the_heat_family_is_that_of_physics_heat(rivals):
    heat = rivals["heat"]
    nu = torch.tensor([[2.0, 1.0], [3.0, 0.5]])
    fields = heat.solutions(nu) + 0.1 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    change = heat.residual(fields).square().flatten(1).mean(1)
    tried = torch.stack(
        [
            physics.heat(fields.transpose(1, 2), diffusivity=value, time_step=heat.TIME_STEP, spacing=heat.SPACING)
            for value in torch.linspace(-1, 6, 7001).tolist()[::10]
        ]
    )
    torch.testing.assert_close(tried.min(0).values, change, rtol=1e-4, atol=0)


def test_the_pairs_of_the_darcy_case_solve_its_equation(rivals):
    darcy = rivals["darcy"]
    fields = darcy.fields(4, 0)
    assert fields.shape == (4, 2, 32, 32)
    remaining = darcy.residual(fields.double())
    assert remaining.abs().max() < 0.05  # the source is 10
    assert remaining.flatten(1).std(1).max() < 1e-3  # one constant per field
    assert fields[:, 0].flatten(1).mean(1).abs().max() < 1e-5
    pair = torch.stack([fields[:, 0] * darcy.UNIT, fields[:, 1].exp()], 1) * torch.linspace(1, 2, 32)
    scaled = torch.stack([pair[:, 0] / darcy.UNIT, pair[:, 1].log()], 1)
    expected = partial(physics.darcy, source=darcy.SOURCE, **darcy.GRID)(pair)
    torch.testing.assert_close(darcy.residual(scaled).square().flatten(1).mean(1), expected, rtol=1e-4, atol=0)
    assert darcy.wasserstein(fields[:, 0] + 0.5, fields[:, 0]) == pytest.approx(
        0.5 / fields[:, 0].std().item(), rel=1e-4
    )


@pytest.mark.parametrize("name", ["flow", "noise"])
def test_samples_of_a_network_that_knows_one_picture_are_that_picture(rivals, name):
    pictures = rivals["pictures"]
    schedule = pictures.flow() if name == "flow" else pictures.diffusion("epsilon")
    picture = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5

    def network(x, timesteps):
        level = noise_level(schedule, timesteps)
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
        return picture.expand(x.shape) if name == "flow" else (x - alpha * picture) / sigma

    samples = pictures.sample(network, torch.empty(3, 1, 4, 4), schedule, seed=0)
    torch.testing.assert_close(samples, picture.expand(3, -1, -1, -1), rtol=0, atol=1e-3)


def test_rows_of_pictures_train_from_the_same_draws(rivals):
    """A loss of weight 0 leaves the training of the plain row, bit for bit; one with a weight does not."""
    pictures = rivals["pictures"]
    known = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trained = []
    for term in (None, Term(total_variation, 0.0), Term(total_variation, 1.0)):
        torch.manual_seed(0)
        network = pictures.Network(4, width=8, local=2)
        training = pictures.Training(5, 16, 1e-2)
        pictures.train(network, known, pictures.diffusion("v_prediction"), term, training, seed=0)
        trained.append(torch.cat([value.flatten() for value in network.state_dict().values()]))
    assert torch.equal(trained[0], trained[1])
    assert (trained[0] - trained[2]).abs().max() > 1e-4


def test_a_new_row_is_added_to_a_file_and_the_others_are_not_computed_again(rivals, tmp_path, monkeypatch):
    """Each row is the one of a run of all rows at once, also where a run was cut off between two rows."""
    fields, problem, trained = rivals["fields"], rivals["heat"].PROBLEM, []
    methods = problem.methods[:3]
    monkeypatch.setattr(fields, "FIELDS", 64)
    monkeypatch.setattr(fields, "SAMPLES", 8)
    train = fields.train

    def counted(network, method, *rest):
        trained.append(method.weight)
        return train(network, method, *rest)

    def run(name, *chosen):
        cut = replace(problem, methods=chosen, seconds=0)
        return fields.run(cut, (0,), tmp_path / name)["rows"]

    monkeypatch.setattr(fields, "train", counted)
    together = run("together.json", *methods)
    run("added.json", methods[0], methods[2])
    trained.clear()
    added = run("added.json", *methods)
    assert trained == [methods[1].weight]
    assert added == together == json.loads((tmp_path / "added.json").read_text())["rows"]
    assert [row["weight"] for row in added] == [*(method.weight for method in methods), 0.0]
    assert run("added.json", methods[0]) == added  # a row that no method asks for any more stays


def test_rows_of_another_training_are_not_mixed_with_new_ones(rivals, tmp_path):
    circle, kept = rivals["circle"], rivals["kept"]
    path = tmp_path / "circle.json"
    kept.Kept(path, [0], "401 epochs", [("plain", 0.0)]).add([{"method": "plain", "weight": 0.0, "residual": [1.0]}])
    before = path.read_text()
    with pytest.raises(kept.OtherSettings, match=r"circle\.json has rows with seeds \[0\], asked for is \[1\]"):
        circle.run(circle.uniform, [1], path)
    assert path.read_text() == before


def test_a_remembered_loss_has_its_values_and_gradients(rivals):
    calls = []

    def counted(x0_hat, /):
        calls.append(len(x0_hat))
        return total_variation(x0_hat) ** 2

    remembered = rivals["predictions"].Remembered(counted)
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for factor in (1, 1, 2):
        x = (factor * images).requires_grad_()
        values = remembered(x)
        expected = total_variation(x) ** 2
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (values, expected)))
    assert calls == [3, 3]  # the second time it was known


@pytest.mark.slow
def test_quick_passes_through_every_case_and_writes_nothing(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (*FOLDER.glob("results/*"), FOLDER / "rivals.txt")}
    run = subprocess.run(
        [sys.executable, FOLDER, "--quick", "--seeds", "0", "--output", tmp_path / "results"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    titles = set(re.findall(r"^[A-Z]\. .*$", run.stdout, re.MULTILINE))
    left_out = re.findall(r"^(\w+) is left out: (\w+) is not installed: pip install .+$", run.stdout, re.MULTILINE)
    assert all(name == "letters" and find_spec(package) is None for name, package in left_out), left_out
    expected = set(re.findall(r"^[A-Z]\. .*$", (FOLDER / "rivals.txt").read_text(), re.MULTILINE))
    assert {title[:2] for title in expected - titles} <= ({"E."} if left_out else set())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"huggingface"}  # the cache of embedded pictures
    if left_out:
        pytest.skip(f"all cases but E passed: {left_out[0][1]} is not installed")
