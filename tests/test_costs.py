"""What a loss costs beside the network, counted in operations, which no machine changes."""

import runpy

import pytest
import torch
from diffusers import DDPMScheduler
from runs import ROOT

from reg_diffusers import Term, noise_level
from reg_diffusers.regularizers import Perceptual
from reg_diffusers.weighting import matched


@pytest.mark.slow
@pytest.mark.project
def test_a_vit_s_on_the_default_gate_costs_at_most_a_third_of_a_step():
    """And it costs what follows from its size, for active images: two forward passes, and the backward to the image.

    The backward of a linear layer to its input costs one forward, that of attention, to queries, keys and values, two.
    """
    script = runpy.run_path(str(ROOT / "docs" / "benchmarks" / "perceptual_flops.py"))
    unet, net = script["networks"]()
    assert round(unet.num_parameters() / 1e6, 1) == 113.7 and net.config.num_hidden_layers == 12
    plain = script["operations"](unet)
    extra = script["operations"](unet, (Term(Perceptual(net, script["PROCESSOR"]), 0.1),)) - plain
    tokens, width, patches = 197, 384, 196
    linear = 12 * 2 * tokens * (4 + 8) * width**2 + 2 * patches * (3 * 16 * 16) * width
    attention = 12 * 2 * tokens**2 * 2 * width
    share = (matched(noise_level(DDPMScheduler(), torch.arange(1000))) > 0).float().mean().item()
    assert 0.1 < share < 0.3
    assert extra == pytest.approx(share * (3 * linear + 4 * attention), rel=1e-3)
    assert extra < 0.35 * plain
