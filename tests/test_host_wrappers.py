"""Networks that a loop wraps, shards or compiles: trained by the loss as the network itself."""

import sys
from pathlib import Path

import pytest
import torch
from in_processes import in_processes
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from reg_diffusers import Ddim, Term, X0Regularization
from reg_diffusers.estimators import one_step
from reg_diffusers.regularizers import total_variation

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "benchmarks"))
import host_loops
import hosts

pytestmark = pytest.mark.loss


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "compiled DDP": lambda network: torch.compile(DistributedDataParallel(network), backend="eager"),
    "FSDP": lambda network: fully_shard(network, mesh=init_device_mesh("cpu", (1,))),
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timesteps):
        return self.layer(sample)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("estimator", [one_step, Ddim(1)], ids=["one_step", "Ddim"])
def test_a_wrapped_network_is_trained_as_the_network_itself(wrapper, estimator, one_process):
    def gradient(wrap):
        torch.manual_seed(0)
        network = Network()
        wrapped = wrap(network)
        step = host_loops.ddpm(hosts.images_of(hosts.HOSTS["eps"], 32), wrapped)
        term = Term(total_variation, weight=0.1, estimator=estimator)
        (step.loss + X0Regularization(step.scheduler, [term])(**step.arguments, model=wrapped).loss).backward()
        found = network.layer.weight.grad
        return found.full_tensor() if hasattr(found, "full_tensor") else found

    torch.testing.assert_close(gradient(WRAPPERS[wrapper]), gradient(lambda network: network))


def gradient_of(network, timesteps, images):
    noise = torch.ones_like(images)
    scheduler = hosts.HOSTS["eps"].loop(images[:1]).scheduler
    x_t = scheduler.add_noise(images, noise, timesteps)
    term = Term(total_variation, weight=0.1, estimator=Ddim(1))
    output = network(x_t, timesteps)
    extra = X0Regularization(scheduler, [term])(output, timesteps, x_t, model=network)
    ((output - noise).square().mean() + extra.loss).backward()


def on_one_process_only(folder):
    """Process 0 calls the network twice, process 1 once, where no image takes part."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network, images = Network(), hosts.images_of(hosts.HOSTS["eps"], 4)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    gradient_of(DistributedDataParallel(network), torch.tensor([5, 50, 998, 999])[own], images[own])
    torch.save(network.layer.weight.grad, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_processes_may_call_the_network_unequally_often(tmp_path):
    in_processes(on_one_process_only, tmp_path)
    torch.manual_seed(0)
    network, images = Network(), hosts.images_of(hosts.HOSTS["eps"], 4)
    gradient_of(network, torch.tensor([5, 50, 998, 999]), images)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), network.layer.weight.grad)
