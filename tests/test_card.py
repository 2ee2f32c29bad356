"""The model card: its text for every kind of model, its code as it is pasted, what it keeps of an earlier one."""

import json
import math
import re

import numpy as np
import PIL.Image
import pytest
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from hub_client import Client, code_blocks
from hub_server import HubServer
from huggingface_hub import ModelCard

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.hub.card import merge_cards, model_card, read_card, write_card
from reg_diffusers.runs.measurement import Measurement, write_comparison

pytestmark = pytest.mark.hub

KINDS = {  # what differs from an unconditional model of grey pictures
    "plain": {},
    "flow": {"scheduler": FlowMatchEulerDiscreteScheduler()},
    "classes": {"num_class_embeds": 3},
    "from_images": {"in_channels": 3, "scheduler": DDIMScheduler(prediction_type="v_prediction")},
    "fields": {"channels": 2, "normalization": {"offset": [2.0, 0.0], "scale": [3.0, 1.0]}},
}

RUN = """
def run(blocks, folder):
    for kind, codes in blocks.items():
        for number, code in enumerate(codes):
            os.makedirs(f"{folder}/{kind}/{number}")
            os.chdir(f"{folder}/{kind}/{number}")
            exec(code, {})
"""
PUSH_AND_RUN = r"""
import re
from huggingface_hub import hf_hub_download
from reg_diffusers import RegDDPMPipeline

blocks = {}
for kind, folder in json.loads(sys.argv[1]).items():
    RegDDPMPipeline.from_pretrained(folder).push_to_hub(f"tester/{kind}", private=True)
    card = open(hf_hub_download(f"tester/{kind}", "README.md")).read()
    blocks[kind] = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
run({kind: codes[:1] for kind, codes in blocks.items()}, sys.argv[2])
tell(**blocks)
"""


def term(name="total_variation", regularizer=None, weight=0.1, weighting="matched", gate="every noise level"):
    given = {"regularizer": regularizer or name, "weight": weight, "weighting": weighting, "gate": gate}
    return {"name": name, **given}


def record(*terms, data=None, snr_gamma=None, prediction_type="epsilon", **more):
    return {
        "command": "accelerate launch train_reg.py --resolution 8",
        **{"seed": 3, "processes": 1, "device": "cuda", "mixed_precision": "bf16", "commit": None},
        "base_model": None,
        "data": {"name": "photos", "hub_id": None, "images": 1234, "classes": None, **(data or {})},
        "objective": {"prediction_type": prediction_type, "snr_gamma": snr_gamma, "terms": list(terms)},
        "versions": {"reg_diffusers": "0.1", "torch": "2"},
        **more,
    }


def rows(*names, images=4, error=0.01, without=True):
    def row(value, loss=None):
        return Measurement(images, dict.fromkeys(names, value), dict.fromkeys(names, error), value / 2, loss)

    title = "with " + " + ".join(names) if names else "samples"
    return {"data": row(0.1), **({"without": row(0.3, 0.5)} if without else {}), title: row(0.2, 0.6)}


@pytest.fixture
def save(tiny_unet, tmp_path):
    """Saves a pipeline of a kind as a run leaves it, and returns the folder."""

    def build(kind="plain", record=None, measured=None):
        config = {"channels": 1, "in_channels": None, "scheduler": DDPMScheduler(), "normalization": None}
        config |= KINDS[kind]
        channels, scheduler, normalization = (config.pop(name) for name in ("channels", "scheduler", "normalization"))
        in_channels = config.pop("in_channels") or channels
        unet = UNet2DModel.from_config({**tiny_unet(channels, **config).config, "in_channels": in_channels})
        folder = tmp_path / kind
        RegDDPMPipeline(unet, scheduler, normalization).save_pretrained(folder)
        if record is not None:
            (folder / "reg_config.json").write_text(json.dumps(record))
        if measured is not None:
            write_comparison(folder / "comparison.json", measured, seed=7, num_inference_steps=5)
        return folder

    return build


def text_of(folder):
    card = model_card(folder, "me/mine").text
    assert "None" not in card and "TODO" not in card and "More Information" not in card
    assert not any(line != line.rstrip() for line in card.splitlines()) and "\n\n\n" not in card.strip()
    return card


# The code


@pytest.mark.slow
def test_the_code_of_every_kind_of_card_runs_as_it_is(save, tmp_path):
    """From the cards that the server got: what needs the package with it, the rest without it."""
    with HubServer() as hub:
        client = Client(hub, tmp_path / "work")
        folders = {kind: str(save(kind, record(), rows())) for kind in KINDS}
        told = client.python(RUN + PUSH_AND_RUN, json.dumps(folders), tmp_path / "with")
        assert all("from reg_diffusers import" in codes[0] for codes in told.values())
        without = {kind: codes[1:] for kind, codes in told.items()}
        script = RUN + "run(json.loads(sys.argv[1]), sys.argv[2])\ntell()"
        client.python(script, json.dumps(without), tmp_path / "without", package=False)
        assert told == {kind: code_blocks(hub.files[f"tester/{kind}"]["README.md"].decode()) for kind in KINDS}
    numbers = {"plain": 3, "flow": 3, "classes": 2, "from_images": 2, "fields": 2}
    assert {kind: len(codes) for kind, codes in told.items()} == numbers
    for kind in KINDS.keys() - {"fields"}:
        for folder, number in (("with", 1), ("without", numbers[kind] - 1)):
            pictures = sorted((tmp_path / folder / kind).glob("*/sample.png"))
            assert len(pictures) == number and {PIL.Image.open(path).size for path in pictures} == {(8, 8)}


@pytest.mark.slow
def test_the_code_of_the_cards_of_runs_runs_as_it_is(tmp_path):
    """Of train_reg.py with classes, with conditioning images and with fields, with the package and without it."""
    with HubServer() as hub:
        client = Client(hub, tmp_path / "work")
        generator, pairs = np.random.default_rng(0), []
        for index in range(8):
            for path in (f"classes/{'ab'[index % 2]}/{index}.png", f"pairs/{index}.png", f"pairs/from/{index}.png"):
                (client.folder / path).parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(client.folder / path)
            pairs.append({"file_name": f"{index}.png", "conditioning_file_name": f"from/{index}.png"})
        (client.folder / "pairs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        np.save(client.folder / "fields.npy", generator.normal(280, 20, (8, 2, 8, 8)))
        for flags in (
            "--train_data_dir classes --class_conditional",
            "--train_data_dir pairs --conditioning_image_column conditioning",
            "--train_data_dir fields.npy --prediction_type flow",
        ):
            kind = flags.split()[1].removesuffix(".npy")
            client.train(*flags.split(), "--max_train_steps", 1, "--output_dir", f"out/{kind}", "--hub_model_id", kind)
        cards = {kind: hub.files[f"tester/{kind}"]["README.md"].decode() for kind in ("classes", "pairs", "fields")}
        blocks = {kind: code_blocks(card) for kind, card in cards.items()}
        without = {kind: [code for code in codes if "reg_diffusers" not in code] for kind, codes in blocks.items()}
        script = RUN + "run(json.loads(sys.argv[1]), sys.argv[2])\ntell()"
        client.python(script, json.dumps(blocks), tmp_path / "with")
        client.python(script, json.dumps(without), tmp_path / "without", package=False)
    assert all(len(blocks[kind]) == 2 and len(without[kind]) == 1 for kind in blocks)
    assert (
        "generates 8 x 8 images of a given class: " in cards["classes"]
        and "The classes: 0 a, 1 b." in cards["classes"]
    )
    assert "generates 8 x 8 images from a given image: " in cards["pairs"]
    assert (
        "generates 8 x 8 fields of 2 channels: " in cards["fields"] and "on 8 fields of fields.npy" in cards["fields"]
    )


def test_the_code_names_the_folder_of_a_run_that_is_not_uploaded(save):
    folder = save()
    write_card(folder, 'runs/of "today"/smooth')
    card = read_card(folder / "README.md").text
    assert r'RegDDPMPipeline.from_pretrained("runs/of \"today\"/smooth")' in card and "\n# smooth\n" in card
    for block in code_blocks(card):
        compile(block, "card", "exec")


# The sentences


def test_introductions(save):
    def introduction(kind, record=None):
        return text_of(save(kind, record)).split("\n\n")[2]

    draws = "A diffusion model that generates"
    photos = "on 1,234 images of photos."
    assert introduction("plain") == f"{draws} 8 x 8 images: a `UNet2DModel`."
    of_class = f"{draws} 8 x 8 images of a given class: a `UNet2DModel`, trained {photos}"
    assert introduction("classes", record()) == of_class
    assert introduction("from_images", record(fine_tuned=True)) == (
        f"{draws} 8 x 8 images from a given image: a `UNet2DModel`, fine-tuned from another model {photos}"
    )
    on_hub = record(data={"name": "me/sea", "hub_id": "me/sea"}, base_model="you/base", fine_tuned=True)
    assert introduction("fields", on_hub) == (
        f"{draws} 8 x 8 fields of 2 channels: a `UNet2DModel`, fine-tuned from [you/base](https://huggingface.co/you/base)"
        " on 1,234 fields of [me/sea](https://huggingface.co/datasets/me/sea)."
    )


def formula(card):
    return code_blocks(card, "text")[0].splitlines()


def test_a_model_without_extra_losses(save):
    card = text_of(save(record=record(), measured=rows(without=False)))
    assert formula(card)[0] == "L = ||eps - model(x_t, t)||^2" and "x0_hat" not in card and "| loss |" not in card
    assert (
        "|  | distance to data | denoising loss |\n|---|---|---|\n| data | 0.0500 |  |\n| samples | 0.1000 |" in card
    )
    assert "Each row is measured on 4 images; samples are drawn in 5 steps from seed 7. The distance is" in card
    assert "goal is" not in card and "*without*" not in card


def test_a_model_with_several_losses(save):
    terms = (term(), term("symmetry", weight=2.0, weighting="constant"), term("mine", "own.losses:mine", gate="t = 0"))
    names = ("total_variation", "symmetry", "mine")
    card = text_of(save(record=record(*terms, prediction_type="v_prediction"), measured=rows(*names)))
    first, _, *definitions = formula(card)
    assert first == (
        "L = ||v - model(x_t, t)||^2 + 0.1 * matched(t) * total_variation(x0_hat) + 2 * constant(t) * symmetry(x0_hat)"
        " + 0.1 * matched(t) * mine(x0_hat)"
    )
    left = [line.split(" = ")[0].strip() for line in definitions]
    assert left == ["x_t", "v", "x0_hat", "matched(t)", "constant(t)"]
    assert len({line.index(" = ") for line in definitions}) == 1
    assert "| `mine` | `own.losses:mine` | 0.1 | `matched` | t = 0 |" in card
    assert "`own.losses` is code of the author that is not in this repository." in card
    assert "The columns of the losses have the mean and its standard error; the goal is the value of the data" in card
    assert "| with total_variation + symmetry + mine | 0.2000 ± 0.0100 | 0.2000 ± 0.0100 |" in card
    assert "*without* is the same training, with the same noise, without the auxiliary losses." in card


def test_a_loss_and_a_weighting_of_ones_own_in_two_modules(save):
    card = text_of(save(record=record(term("Mine", "losses:Mine", weighting="levels:early"))))
    assert formula(card)[0].endswith(" + 0.1 * early(t) * Mine(x0_hat)")
    assert formula(card)[-1] == "early(t) = levels:early, defined by the author"
    assert "`losses` and `levels` are code of the author that is not in this repository." in card


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_formulas_are_those_of_the_library(kind):
    """Each is evaluated with numbers, against what the library computes."""
    import torch

    from reg_diffusers import add_noise, noise_level, predict_original_sample, prediction_target
    from reg_diffusers.hub.objective_text import _FORMULAS

    is_flow = kind == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if is_flow else DDPMScheduler(prediction_type=kind)
    t, x_0, eps = torch.tensor([300]), *torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x_0, eps = x_0[None], eps[None]
    level = noise_level(scheduler, t)
    x_t = add_noise(scheduler, x_0, eps, t)
    names = {"x_0": x_0, "eps": eps, "x_t": x_t, "t": t}
    names |= {"alpha": lambda t: level.alpha, "sigma": lambda t: level.sigma}
    torch.testing.assert_close(x_t, eval("alpha(t) * x_0 + sigma(t) * eps", names))
    output, meaning, implied = _FORMULAS[kind]
    target = prediction_target(scheduler, x_0, eps, t)
    torch.testing.assert_close(eval(meaning or output, names), target)
    names["model"] = lambda x_t, t: target + 0.1
    estimate = predict_original_sample(scheduler, target + 0.1, t, x_t)
    torch.testing.assert_close(eval(implied, names), estimate)


@pytest.mark.parametrize("name", ["constant", "snr", "matched", "alpha_bar", "truncated_snr", "low_noise"])
def test_the_weightings_are_those_of_the_library(name):
    import torch

    from reg_diffusers import load_weighting, noise_level
    from reg_diffusers.hub.objective_text import _WEIGHTINGS

    t = torch.tensor([0, 20, 150, 199])
    level = noise_level(DDPMScheduler(), t)
    text = _WEIGHTINGS[name].split(", 0 at high")[0].split("SNR(t) = ")[-1].replace("^", "**")
    text = text.replace("1 for t < 200, else 0", "(t < 200) * 1.0")
    names = {"t": t, "max": lambda values, least: values.clamp(min=least)}
    names["min"] = lambda values, most: values.clamp(max=most)
    for letter, values in {"alpha": level.alpha, "sigma": level.sigma, "SNR": level.snr}.items():
        names[letter] = lambda t, values=values: values
    names["w"] = lambda t: level.denoising_weight
    expected = load_weighting(name)(level)
    torch.testing.assert_close(torch.as_tensor(eval(text, names)).float().expand(4), expected)


def test_min_snr_weights_the_image(save):
    card = text_of(save(record=record(term(), snr_gamma=5.0, prediction_type="v_prediction")))
    assert formula(card)[0] == "L = min(SNR(t), 5) * ||x_0 - x0_hat||^2 + 0.1 * matched(t) * total_variation(x0_hat)"
    assert "\nSNR(t) " in card and "\nv " not in card


def test_a_single_image_has_no_standard_error_and_a_lambda_is_not_taken_for_a_tag(save):
    measured = rows("<lambda>", images=1, error=math.nan, without=False)
    card = text_of(save(record=record(term("<lambda>", "mine:f")), measured=measured))
    assert "|  | &lt;lambda&gt; | distance to data |" in card and "| 0.2000 | 0.1000 |" in card and "nan" not in card


def test_classes_are_named_beside_their_numbers(save):
    few = text_of(save("classes", record(data={"classes": ["cat", "dog", "bee"]})))
    assert "The classes: 0 cat, 1 dog, 2 bee.\n" in few and "class_labels=0" in few
    many = text_of(save("classes", record(data={"classes": [f"c{number}" for number in range(60)]})))
    assert "48 c48, 49 c49, ...\n" in many


def test_how_to_make_it_again(save):
    card = text_of(save(record=record(processes=2, commit="abc with changes")))
    said = "Seed 3, 2 processes on cuda, mixed precision bf16; reg_diffusers 0.1, torch 2, commit abc with changes."
    assert said in card and "push_to_hub" not in card
    assert code_blocks(card, "bash") == ["accelerate launch train_reg.py --resolution 8\n"]


def test_measurements_of_the_model_before_it_was_trained_further_go(train):
    flags = ("--checkpointing_steps", 1, "--max_train_steps")
    out = train("--compare", *flags, 1)
    measured = {"comparison.json", "comparison.png", "evaluation.png"}
    assert measured <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert 'RegDDPMPipeline.from_pretrained("out")' in card and "![Loss against distance](evaluation.png)" in card
    train(*flags, 2, "--resume", "auto", "--allow_changed_settings")
    assert not measured & {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "Objective" in card and "evaluation.png" not in card


def test_a_card_that_cannot_be_read_is_said_before_the_training(train, capsys):
    out = train("--max_train_steps", 1)
    (out / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(SystemExit):
        train("--max_train_steps", 1, "--overwrite_output_dir")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--output_dir out: the metadata of its README.md cannot be read: " in said
    assert said.endswith("repair or remove that file") and (out / "model_index.json").exists()


# The metadata


def test_results_that_are_no_number_are_left_out(save):
    data = model_card(save(record=record(term()), measured=rows("total_variation")), "me/mine").data
    assert data.model_name == "mine" and data.tags[:2] == ["diffusers", "unconditional-image-generation"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        **{"L' total_variation": 0.2, "sliced Wasserstein distance": 0.1, "denoising loss": 0.6}
    }
    infinite = {"samples": Measurement(4, {"a": math.inf}, {"a": math.nan}, 0.5)}
    data = model_card(save(record=record(term("a")), measured=infinite), "me/mine").data
    assert [result.metric_name for result in data.eval_results] == ["sliced Wasserstein distance"]
    assert yaml.safe_load(data.to_yaml())["license"] == "unknown"


def test_a_written_card_is_merged_once_however_often(save):
    folder = save(record=record(term()), measured=rows("total_variation"))
    users = "---\nlicense: mit\nlanguage: en\ntags: [reg_diffusers, art]\nextra: {a: 1}\n---\nBefore.\n"
    (folder / "README.md").write_text(users.replace("\n", "\r\n"), newline="")
    write_card(folder, "me/mine")
    once = (folder / "README.md").read_text() + "\nAfter.\n"
    (folder / "README.md").write_text(once)
    for _ in range(2):
        write_card(folder, "me/mine")
    assert (folder / "README.md").read_text() == once
    card = read_card(folder / "README.md")
    assert card.text.strip().startswith("Before.") and card.text.strip().endswith("After.")
    assert card.data.extra == {"a": 1} and card.data.language == "en" and card.data.license == "mit"
    assert sorted(card.data.tags) == ["art", "diffusers", "reg_diffusers", "unconditional-image-generation"]
    write_card(folder, "me/mine", license="apache-2.0")
    assert read_card(folder / "README.md").data.license == "apache-2.0"


def test_results_of_the_model_before_go_and_those_of_the_owner_stay(save):
    folder = save(record=record(term()), measured=rows("total_variation"))
    old = model_card(folder, "me/old")
    theirs = old.data.eval_results[0].__class__("t", "d", "D", "fid", 12.5, metric_name="FID")
    old.data.eval_results.append(theirs)
    (folder / "comparison.json").unlink()
    (kept,) = merge_cards(model_card(folder, "me/new"), old).data.eval_results
    assert kept.metric_name == "FID"
    write_comparison(folder / "comparison.json", rows("symmetry"), seed=0, num_inference_steps=1)
    names = [result.metric_name for result in merge_cards(model_card(folder, "me/new"), old).data.eval_results]
    assert names == ["L' symmetry", "sliced Wasserstein distance", "denoising loss", "FID"]


def test_a_card_whose_metadata_are_broken_is_refused(tmp_path):
    for content in (b"---\nlicense: [mit\n---\n", b"---\n- a list\n---\n", b"\xff\xfe"):
        (tmp_path / "README.md").write_bytes(content)
        with pytest.raises(ValueError, match=r"the metadata of its README.md cannot be read"):
            read_card(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("No metadata at all.")
    assert read_card(tmp_path / "README.md").text == "No metadata at all."


# Names that anybody may have given


def test_a_weighting_of_the_authors_own_keeps_apart_from_the_built_in_one(save):
    terms = term(), term("symmetry", weighting="m:matched")
    text = text_of(save(record=record(*terms)))
    assert "0.1 * matched(t) * total_variation(x0_hat) + 0.1 * m.matched(t) * symmetry(x0_hat)" in text
    formula, own = (
        next(line for line in text.splitlines() if line.startswith(f"{name}(t) ")) for name in ("matched", "m.matched")
    )
    assert "min(w(t), 100)" in formula
    assert "m:matched, defined by the author" in own


def test_names_with_bars_backticks_and_html_stay_names(save):
    """A column, a code block or a script in a card would be somebody else's."""
    odd = "a|b `c` <script>alert(1)</script>"
    written = record(term(odd, regularizer=odd), data={"name": odd, "classes": [odd, "``` *cat*"]})
    text = text_of(save("classes", record=written, measured=rows(odd)))
    prose = re.sub(r"(`+) ?.*?(?<!`)\1(?!`)", "", re.sub(r"^(```+).*?^\1$", "", text, flags=re.M | re.S))
    assert "<script" not in prose
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "script" in line or "loss" in line}
    assert columns <= {5, 6}
    assert r"``` \*cat\*" not in prose and r"\*cat\*" in prose


def test_a_card_that_is_a_link_is_replaced_and_its_target_stays(save):
    folder = save("plain")
    (folder / "notes.md").write_text("My own words.\n")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to("notes.md")
    write_card(folder, "user/name")
    assert not (folder / "README.md").is_symlink() and "My own words." in (folder / "README.md").read_text()
    assert (folder / "notes.md").read_text() == "My own words.\n"


@pytest.mark.parametrize("old", [None, ModelCard("---\nlicense: mit\n---\n")])
def test_a_card_that_is_a_link_out_of_its_folder_is_refused(save, tmp_path, old):
    folder, outside = save("plain"), tmp_path / "outside.md"
    outside.write_text("secret\n")
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(outside)
    with pytest.raises(
        ValueError, match=r"README\.md is a link out of .*, and writing would follow it: remove the link"
    ):
        write_card(folder, "user/name", old)
    assert outside.read_text() == "secret\n"


def test_a_card_names_what_a_loss_looks_at(save):
    own = {**term("sparsity"), "estimator": "mine:twice"}
    folder = save(record=record({**term(), "estimator": "ddim(1)"}, own, term("symmetry")))
    card = str(model_card(folder, "me/mine"))
    assert "* total_variation(ddim(1)) + 0.1 * matched(t) * sparsity(mine:twice) + 0.1 * matched(t) * symm" in card
    assert "matched(t) * symmetry(x0_hat)" in card
    assert re.search(r"^ddim\(1\) +=", card, re.M)
    assert "mine:twice, an estimate of the image defined by the author" in card and "`mine` is code" in card


def test_a_card_names_the_schedule_of_a_weight(save):
    scheduled = {**term("sparsity"), "schedule": "warmup(500) * mine:later"}
    card = str(model_card(save(record=record(scheduled, term())), "me/mine"))
    assert "+ factor(step) * 0.1 * matched(t) * sparsity(x0_hat) + 0.1 * matched(t) * total_variation" in card
    assert "| 0.1, times `warmup(500) * mine:later` |" in card and "`mine` is code of the author" in card
    assert re.search(r"^factor\(step\) += the schedule", card, re.M)
