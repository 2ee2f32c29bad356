"""The similarity of x0_hat to its prompt, by a tiny CLIP model with a vocabulary of its own."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from losses import images, scheduler_of
from runs import metrics

from reg_diffusers import Term, X0Regularization, load_regularizer
from reg_diffusers.regularizers import PromptSimilarity, prompt_similarity, threshold
from reg_diffusers.regularizers.network_input import NetworkInput

LENGTH = 12  # of the text, in tokens
PROMPTS = ["a red car", "a cat", "a red car"]
NUMBERS = {
    "size": {"shortest_edge": 16},
    "crop_size": 16,
    "do_center_crop": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel with random weights, its tokenizer of single letters, and its image processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "max_position_embeddings": LENGTH, **sizes, **ends}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))  # else all features are nearly parallel
    model.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(**NUMBERS).save_pretrained(folder)
    return folder


def shown(*shape):
    return images(*shape, dtype=torch.float32).clamp(-1, 1)


@pytest.mark.loss
def test_it_is_one_minus_the_cosine_of_the_models_own_features(folder):
    ours, x = PromptSimilarity.from_pretrained(folder), shown(3, 3, 20, 24)
    assert ours.needs == ("prompt",) and Term(ours, 0.1).name == "prompt_similarity"
    tokens = ours.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = ours.net(**tokens, pixel_values=NetworkInput.of(NUMBERS)((x + 1) / 2))
    expected = 1 - output.logits_per_image.diag() / ours.net.logit_scale.exp()
    found = ours(x, prompt=PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[0] != ours(x, prompt=PROMPTS[1])[0]  # one text for all
    grey = ours(x[:, :1], prompt=PROMPTS)
    torch.testing.assert_close(grey, ours(x[:, :1].expand(-1, 3, -1, -1), prompt=PROMPTS))
    unit = PromptSimilarity(ours.net, ours.tokenizer, NUMBERS, input_range="[0, 1]")((x + 1) / 2, prompt=PROMPTS)
    torch.testing.assert_close(unit, found)


@pytest.mark.loss
def test_a_text_is_computed_once_and_does_not_depend_on_the_others(folder, monkeypatch):
    ours, x = PromptSimilarity.from_pretrained(folder), shown(3, 3, 16, 16)
    seen, original = [], ours.net.get_text_features
    monkeypatch.setattr(ours.net, "get_text_features", lambda **tokens: seen.append(1) or original(**tokens))
    first = ours(x, prompt=PROMPTS)
    assert torch.equal(ours(x, prompt=tuple(PROMPTS)), first) and len(seen) == 2
    alone = PromptSimilarity.from_pretrained(folder)
    assert torch.equal(alone(x[1:2], prompt=["a cat"]), ours(x[1:2], prompt=["a cat"])) and len(seen) == 2
    monkeypatch.setattr(prompt_similarity, "_PROMPTS_KEPT", 2)
    ours(x[:1], prompt=["a dog"])
    assert list(ours._text_features) == ["a cat", "a dog"]


@pytest.mark.loss
def test_the_gradient_is_that_of_the_value(folder):
    net = PromptSimilarity.from_pretrained(folder, "a cat", dtype=torch.float64)
    x = (images(2, 1, 12, 12) / 4).requires_grad_()
    assert net.needs == () and torch.autograd.gradcheck(net, x, atol=1e-4)


@pytest.mark.loss
def test_in_training_prompts_follow_the_images(folder):
    net = PromptSimilarity.from_pretrained(folder)
    output, noise = shown(2, 4, 3, 16, 16)
    output.requires_grad_()
    term = Term(threshold(net, 0.1), 1.0, lambda level: torch.tensor([0.0, 1.0, 0.0, 1.0]))
    ours = X0Regularization(scheduler_of("sample"), [term]).train()
    assert ours.needs == ("prompt",) and not ours.state_dict() and not net.net.training
    found = ours(output, 10, noise, prompt=["a", "b", "c", "d"])
    expected = (net(output[1::2], prompt=["b", "d"]) - 0.1).clamp(min=0).sum() / 4
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert output.grad.abs().sum((1, 2, 3)).bool().tolist() == [False, True, False, True]
    assert all(weight.grad is None for weight in net.net.parameters())


@pytest.mark.loss
def test_half_precision(folder):
    net = PromptSimilarity.from_pretrained(folder, "a cat", dtype=torch.bfloat16)
    found, expected = net(shown(2, 3, 16, 16).bfloat16()), PromptSimilarity.from_pretrained(folder, "a cat")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(shown(2, 3, 16, 16)), rtol=0, atol=0.05)


@pytest.mark.loss
def test_what_is_left_out_or_wrong_is_said(folder):
    ours, x = PromptSimilarity.from_pretrained(folder), shown(2, 3, 16, 16)
    with pytest.warns(
        UserWarning, match=r"prompt 'abcdefghijklmn'... has 16 tokens, of which the network reads the first 12"
    ):
        ours(x, prompt="abcdefghijklmn")
    with pytest.raises(ValueError, match="prompt has 3 texts for 2 images"):
        ours(x, prompt=PROMPTS)
    with pytest.raises(ValueError, match="PromptSimilarity needs pictures of 1 or 3 channels"):
        ours(torch.zeros(1, 4, 8, 8), prompt="a cat")
    with pytest.raises(TypeError, match="needs a CLIPModel of transformers, not Identity"):
        PromptSimilarity(torch.nn.Identity(), ours.tokenizer, NUMBERS)
    with pytest.raises(ValueError, match=r"needs name_or_folder: it is prompt_similarity\(name_or_folder"):
        load_regularizer("prompt_similarity")
    assert load_regularizer(f"prompt_similarity('{folder}', prompt='a cat')").prompt == "a cat"


@pytest.mark.loss
def test_training_raises_the_similarity(folder):
    """Steps along the gradient make an image fit one prompt better."""
    net, x = PromptSimilarity.from_pretrained(folder, "a red car"), shown(2, 3, 16, 16)
    before = net(x)
    for _ in range(5):
        x = x - F.normalize(torch.autograd.grad(net(x.requires_grad_()).sum(), x)[0].flatten(1)).view_as(x)
    assert (net(x) < before - 0.01).all()


@pytest.mark.slow
@pytest.mark.training
def test_the_command_line_takes_a_fixed_prompt(train, folder, image_folder):
    spec = f"prompt_similarity('{folder}', 'a red car')"
    flags = ("--max_train_steps", 10, "--reg_weighting", "constant", "--regularizer", spec)
    (line,) = metrics(train(*flags, "--train_data_dir", image_folder()))
    assert 0 < line["raw/prompt_similarity"] < 2 and line["gradient_ratio/prompt_similarity"] > 0
