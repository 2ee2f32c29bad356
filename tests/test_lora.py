"""train_reg.py --lora_rank: fine-tuning of a text-to-image pipeline, with losses on the decoded picture."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from runs import ROOT, refusal
from safetensors.torch import load_file
from tiny_pipelines import save_stable_diffusion, write_photos

from reg_diffusers import RegTextToImagePipeline
from reg_diffusers.cli import main

pytestmark = pytest.mark.training


@pytest.fixture
def fine_tune(train, tmp_path):
    """Runs the script on a tiny Stable Diffusion and eight images with texts; returns the output folder."""
    pytest.importorskip("peft")
    save_stable_diffusion("base", tmp_path / "scratch", prediction_type="epsilon")
    write_photos()

    def run(*flags, rank=4, texts=("--caption_column", "text"), base="base", **kwargs):
        chosen = (*texts, *(() if rank is None else ("--lora_rank", rank)))
        given = "--train_data_dir photos --resolution 16 --regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1 --learning_rate 1e-2 --eval_batch_size 2"
        model = ("--pretrained_model_name_or_path", base)
        return train(*given, *chosen, *quick.split(), *flags, model=model, **kwargs)

    return run


def adapters(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def differ(one, other):
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)


def drawn(pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    return pipeline("a cat", generator=generator, **call).images


def test_the_folder_holds_adapters_that_stock_diffusers_draws_the_same_image_with(fine_tune, train, monkeypatch):
    trained = []
    train_of_script = train.script.train
    monkeypatch.setattr(train.script, "train", lambda *given: trained.append(train_of_script(*given)))
    out = fine_tune("--validation_prompts", "cat", "--preview_steps", 2, "--lora_alpha", 8)
    left = {path.name for path in out.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "samples", "metrics.jsonl", "reg_config.json"} <= left
    assert not left & {"unet", "vae", "vqvae", "text_encoder", "model_index.json"}  # nothing of the base
    (model,) = trained
    stock = StableDiffusionPipeline.from_pretrained("base")
    plain = drawn(stock)
    stock.load_lora_weights(str(out))
    with_adapters = drawn(stock)
    assert np.abs(with_adapters - plain).max() > 1e-3
    own = StableDiffusionPipeline.from_pretrained("base", unet=model.unet)
    np.testing.assert_allclose(with_adapters, drawn(own), atol=1e-5)
    card = ModelCard((out / "README.md").read_text())
    assert card.data.pipeline_tag == "text-to-image" and "lora" in card.data.tags
    trained_on = "trained on 8 images of photos at 16 x 16: `pytorch_lora_weights.safetensors`."
    assert f"{trained_on} The images are RGB, with 8 bits.\n" in card.text
    assert PIL.Image.open(out / "samples" / "step-000002.png").size[0] > 64


def test_a_resumed_run_equals_an_uninterrupted_one_and_checkpoints_hold_no_base(fine_tune):
    flags = ("--checkpointing_steps", 2, "--condition_dropout", 0.5, "--random_flip")
    whole = adapters(fine_tune(*flags, output="whole"))
    out = fine_tune(*flags)
    kept = load_file(out / "checkpoint-2" / "model.safetensors")
    assert kept and all("lora" in name for name in kept)
    shutil.rmtree(out / "checkpoint-4")
    (out / "pytorch_lora_weights.safetensors").unlink()
    fine_tune(*flags, "--resume", "auto")
    assert not differ(adapters(out), whole)


def test_adapters_are_not_continued_on_another_base_or_other_texts_under_the_same_name(fine_tune, capsys, tmp_path):
    fine_tune("--checkpointing_steps", 2)
    save_stable_diffusion("other", tmp_path / "scratch", seed=1, prediction_type="epsilon")
    for part, name in (("unet", "frozen weights"), ("text_encoder", "texts"), ("vae", "autoencoder")):
        Path("base", part).rename("own")
        shutil.copytree(Path("other", part), Path("base", part))
        error = refusal(fine_tune, capsys, "--resume", "auto")
        assert f"trained with other settings: {name} " in error and error.count("->") == 1
        shutil.rmtree(Path("base", part))
        Path("own").rename(Path("base", part))
    write_photos(texts=["a cat", "a dog", "a cat", "dog"])
    error = refusal(fine_tune, capsys, "--resume", "auto")
    assert "trained with other settings: content of the data " in error and ", texts " in error


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("--lora_rank", 4), "of another rank: see --lora_rank"),
        (("--lora_target_modules", "to_q"), "in other layers: see --lora_target_modules"),
    ],
)
def test_adapters_of_another_shape_are_refused_where_changed_settings_are_allowed(fine_tune, capsys, changed, reason):
    fine_tune("--checkpointing_steps", 4, rank=1)
    flags = ("--resume", "auto", "--allow_changed_settings", "--lr_scheduler", "constant", "--max_train_steps", 6)
    assert reason in refusal(fine_tune, capsys, *flags, *changed, rank=1)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_part_of_the_text_encoder_is_one_line(fine_tune, capsys, part):
    shutil.rmtree(Path("base", part))
    assert "--pretrained_model_name_or_path base: no readable text encoder" in refusal(fine_tune, capsys)


def test_one_text_for_all_images_and_dropped_texts_change_the_training(fine_tune):
    by_column, by_prompt, without = (
        adapters(fine_tune(*flags, output=name, **kwargs))
        for name, flags, kwargs in (
            ("a", (), {}),
            ("b", (), {"texts": ("--prompt", "a cat")}),
            ("c", ("--condition_dropout", 0.9), {}),
        )
    )
    assert differ(by_column, by_prompt) and differ(by_column, without)


def test_texts_are_embedded_once_and_the_tokenizer_s_cuts_are_counted(fine_tune, capsys):
    write_photos(texts=["a cat", "dog", "abcdefgh abcdefgh"])
    fine_tune()
    printed = capsys.readouterr()
    assert "cuts off the end of 2 of 8 texts, such as 'abcdefgh abcdefgh'" in printed.err
    assert ", LoRA weights of 16 kB; " in printed.out
    (cached,) = Path("cache", "reg_diffusers").glob("prompts-*.npy")
    assert len(np.load(cached)) == 4  # three texts and the empty one
    before = cached.stat().st_mtime_ns
    fine_tune(output="again")
    assert cached.stat().st_mtime_ns == before


def test_what_cannot_work_is_refused_in_one_line(fine_tune, capsys, monkeypatch):
    def refused(*flags, **kwargs):
        return refusal(fine_tune, capsys, *flags, **kwargs)

    assert "'0' is not a whole number above 0" in refused(rank=0)
    assert "no adapter can be added there; linear layers of this network end in" in refused(
        "--lora_target_modules", "nothing"
    )
    assert "needs a text for each image" in refused(texts=())
    assert "--prompt and --caption_column are mutually exclusive" in refused("--prompt", "a")
    assert "there is no such column; the columns are: image" in refused(texts=("--caption_column", "words"))
    assert "holds no texts" in refused(texts=("--caption_column", "number"))
    write_photos(texts=["a cat", ""])
    assert "4 of 8 images have no text, the first is row 1" in refused()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("reg_diffusers.networks.lora.find_spec", lambda name: None)
    assert "not installed: pip install peft" in refused(texts=("--prompt", "a"))


def test_texts_without_a_text_to_image_model_are_refused(train, capsys):
    error = refusal(train, capsys, "--prompt", "a cat")
    known = "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline"
    assert error.endswith(f"({known}): name one by --pretrained_model_name_or_path")
    assert "--prompt needs a text-to-image pipeline" in refusal(train, capsys, "--prompt", "")
    assert "--lora_alpha has no effect without --lora_rank" in refusal(train, capsys, "--lora_alpha", 2)


def test_a_pipeline_of_an_unknown_class_is_refused_with_the_list(train, capsys, tmp_path):
    base = save_stable_diffusion("base", tmp_path / "scratch")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInpaintPipeline"
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    error = refusal(train, capsys, model=("--pretrained_model_name_or_path", base))
    assert "a StableDiffusionInpaintPipeline is not supported" in error and "StableDiffusionPipeline" in error
    error = refusal(train, capsys, "--lora_rank", 2, model=("--pretrained_model_name_or_path", base))
    assert error.endswith(
        f"FluxPipeline): name one by --pretrained_model_name_or_path in the place of {base}, a"
        " StableDiffusionInpaintPipeline"
    )


def test_a_model_at_the_wrong_flag_is_refused_with_the_right_one(train, capsys, tmp_path):
    base = save_stable_diffusion("base", tmp_path / "scratch")
    pretrained, config = "--pretrained_model_name_or_path", "--model_config_name_or_path"
    for flag, name, message in (
        (pretrained, "unet", "name the folder of its pipeline"),
        (pretrained, "vae", "holds AutoencoderKL, not UNet2DModel or DiTTransformer2DModel: name it by --vae"),
        (config, "vae", "holds AutoencoderKL, not UNet2DModel or DiTTransformer2DModel: name it by --vae"),
        (config, ".", "or fine-tune it by --pretrained_model_name_or_path"),
    ):
        assert message in refusal(train, capsys, model=(flag, str(tmp_path / base / name)))
    index = tmp_path / base / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    for command in (("sample",), ("evaluate", "--data", "photos")):
        with pytest.raises(SystemExit):
            main([*command, "--model", str(base)])
        assert f"--model {base}: a StableDiffusionInpaintPipeline is not supported" in capsys.readouterr().err


PAGE = (ROOT / "docs" / "stable_diffusion.md").read_text()
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_the_page_run_on_the_tiny_pipeline(number, train, tmp_path):
    pytest.importorskip("peft")
    save_stable_diffusion("base", tmp_path / "scratch")
    write_photos()
    Path("my_module.py").write_text("class MyReg:\n    def __call__(self, x):\n        return x.flatten(1).var(1)\n")
    commands = re.findall(r"^accelerate launch train_reg.py (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    flags = shlex.split(commands[number].replace(BASE, "base"))
    quick = "--resolution 16 --max_train_steps 2 --num_threads 1 --cache_dir cache".split()
    train(*flags, *quick, model=(), output="reg-ddpm-model")
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code.replace(BASE, "base"), namespace)
    assert PIL.Image.open("bicycle.png").size == PIL.Image.open("smooth_bicycle.png").size == (16, 16)


@pytest.mark.slow
def test_a_run_without_texts_imports_no_text_to_image_pipeline():
    code = (
        "import sys, reg_diffusers.training.saves;"
        "print([name for name in sys.modules if name.startswith('diffusers.pipelines.stable_diffusion')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and "torchvision" not in done.stderr


@pytest.mark.slow
def test_held_out_images_are_measured_and_the_best_adapters_are_kept(fine_tune):
    """The best ones are the last ones here, because the loss falls."""
    flags = ("--validation_split", 0.25, "--validation_steps", 2, "--keep_best", "--random_flip")
    out = fine_tune(*flags, "--lr_warmup_steps", 0)
    measured = json.loads((out / "validation.json").read_text())
    assert measured["best"]["step"] == measured["last"]["step"] == 4
    assert measured["last"]["validation/raw/total_variation"] > 0
    assert {path.name for path in (out / "best").iterdir()} == {"pytorch_lora_weights.safetensors"}
    assert not differ(adapters(out / "best"), adapters(out))
    own = json.loads((out / "reg_config.json").read_text())["data"]["held_out"]
    assert own["images"] == 2 and measured["images"] == 2


def test_what_is_not_saved_of_a_wrapped_pipeline_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    stock = StableDiffusionPipeline.from_pretrained(save_stable_diffusion(tmp_path / "base", tmp_path / "scratch"))
    wrapped = RegTextToImagePipeline.of(stock)
    with pytest.raises(ValueError, match="the network has no LoRA weights, and others are not saved here"):
        wrapped.save_pretrained(tmp_path / "saved")
    config = peft.LoraConfig(r=1, target_modules=["to_q"])
    for name in ("default_0", "default_1"):
        stock.unet.add_adapter(config, adapter_name=name)
    with pytest.raises(ValueError, match=r"LoRA weights \(default_0, default_1\): delete_adapters all but one"):
        wrapped.save_pretrained(tmp_path / "saved")
    stock.delete_adapters("default_0")
    wrapped.save_pretrained(tmp_path / "saved")
    assert len(adapters(tmp_path / "saved")) == 16
    with pytest.raises(TypeError, match="repo_id has no effect without push_to_hub"):
        wrapped.save_pretrained(tmp_path / "saved", repo_id="tester/lora")
    stock.text_encoder.add_adapter(peft.LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="text_encoder has LoRA weights, which are not saved here"):
        wrapped.save_pretrained(tmp_path / "saved")
