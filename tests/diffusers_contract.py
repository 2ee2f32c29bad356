"""What diffusers tests of each of its pipelines, on RegDDPMPipeline; run by test_pipeline_contract.py."""

import unittest

import torch
from diffusers import DDIMScheduler, UNet2DModel
from tests.pipelines.pipeline_params import UNCONDITIONAL_IMAGE_GENERATION_PARAMS
from tests.pipelines.test_pipelines_common import PipelineTesterMixin

from reg_diffusers import RegDDPMPipeline


class Safe(RegDDPMPipeline):
    """Saves safetensors where the mixin asks for pickles, which this pipeline does not load."""

    def save_pretrained(self, save_directory, safe_serialization=True, **kwargs):
        super().save_pretrained(save_directory, **kwargs)


class RegDDPMPipelineTests(PipelineTesterMixin, unittest.TestCase):
    pipeline_class = Safe
    params = UNCONDITIONAL_IMAGE_GENERATION_PARAMS
    batch_params = frozenset()
    # There are no prompts; and no unconditional pipeline of diffusers takes latents.
    required_optional_params = PipelineTesterMixin.required_optional_params - {"num_images_per_prompt", "latents"}

    def get_dummy_components(self):
        torch.manual_seed(0)
        unet = UNet2DModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=8,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        return {"unet": unet, "scheduler": DDIMScheduler()}

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        return {"batch_size": 1, "generator": generator, "num_inference_steps": 2, "output_type": "np"}
