"""push_to_hub of what `train` returns, of every kind; diffusers loads it by the name of the repository."""

import json
import re

import pytest
from hub_client import Client
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny_pipelines import save_stable_diffusion, write_photos

pytestmark = [pytest.mark.hub, pytest.mark.slow]

FLAGS = {
    "pixels": "",
    "dit": "--vae base/vae --model_config_name_or_path small --class_conditional --label_column text",
    "whole": "--pretrained_model_name_or_path base --caption_column text",
    "lora": "--pretrained_model_name_or_path base --caption_column text --lora_rank 2",
}
QUICK = (
    "--train_data_dir photos --resolution 16 --max_train_steps 1 --train_batch_size 4 --learning_rate 1e-2"
    " --lr_warmup_steps 0 --regularizer total_variation --reg_weight 0.1 --eval_batch_size 1 --num_threads 1"
    " --ddpm_num_inference_steps 1 --mixed_precision no --cache_dir cache --output_dir"
)


def test_what_train_returns_is_pushed_with_its_records(tmp_path):
    pytest.importorskip("peft")
    with HubServer() as hub:
        client = Client(hub, tmp_path / "work")
        save_stable_diffusion(client.folder / "base", client.folder / "scratch")
        write_photos(8, folder=client.folder / "photos")
        told = client.python(
            """
            from accelerate.state import AcceleratorState, GradientState, PartialState
            from diffusers import DiffusionPipeline, DiTTransformer2DModel
            from reg_diffusers.settings.arguments import parse_args
            from train_reg import train

            sizes = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1)
            DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2).save_config("small")

            def loaded(name, source):
                pipeline = DiffusionPipeline.from_pretrained("base" if name == "lora" else source)
                if name == "lora":
                    pipeline.load_lora_weights(source)
                pipeline.set_progress_bar_config(disable=True)
                return pipeline

            def draw(name, pipeline):
                what = dict(pixels=dict(batch_size=1), dit=dict(class_labels=[1])).get(name)
                what = what or dict(prompt="a cat", height=16, width=16)
                torch.manual_seed(0)  # DiTPipeline passes its generator to no step
                return pipeline(**what, num_inference_steps=2, output_type="np").images.tolist()

            facts = {}
            for name, flags in json.loads(sys.argv[1]).items():
                for state in (AcceleratorState, PartialState, GradientState):
                    state._reset_state()
                train(parse_args([*sys.argv[2].split(), name, *flags.split()])).push_to_hub(f"tester/{name}")
                remote, local = (loaded(name, source) for source in (f"tester/{name}", name))
                facts[name] = dict(kind=type(remote).__name__, images=[draw(name, one) for one in (remote, local)])
            tell(**facts)
            """,
            json.dumps(FLAGS),
            QUICK,
            seconds=400,
        )
        files = hub.files
    kinds = {"pixels": "DDPMPipeline", "dit": "DiTPipeline"}
    for name in FLAGS:
        assert told[name]["kind"] == kinds.get(name, "StableDiffusionPipeline")
        remote, local = told[name]["images"]
        assert remote == local
        pushed = files[f"tester/{name}"]
        assert {"reg_config.json", "reg_settings.yaml", "metrics.jsonl", "samples/step-000001.png"} <= pushed.keys()
        card = ModelCard(pushed["README.md"].decode()).text
        assert "trained on 8 images of photos" in card and "0.1 * matched(t) * total_variation(x0_hat)" in card
        assert re.search(r"^[^#`]*train.* --regularizer total_variation", card, re.MULTILINE)
        assert not any(str(tmp_path).encode() in content for content in pushed.values())  # no path of this machine
    assert "pytorch_lora_weights.safetensors" in pushed and "model_index.json" not in pushed
