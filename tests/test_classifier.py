"""The loss by a small classifier trained on the labels of the data."""

import json

import pytest
import torch
import torch.nn.functional as F
from losses import images, scheduler_of
from runs import ROOT, differ, metrics, refusal, weights

from reg_diffusers import Term, X0Regularization, load_regularizer
from reg_diffusers.evaluation.features import train_classifier
from reg_diffusers.regularizers import Classifier, Perceptual, Score, classifier
from reg_diffusers.specs import built_in_regularizers
from reg_diffusers.weighting import constant


def labelled(number=300, channels=1, size=8):
    """Three classes that differ by their mean."""
    labels = torch.randint(3, (number,), generator=torch.Generator().manual_seed(0))
    noise = images(number, channels, size, size, dtype=torch.float32)
    return 0.2 * noise + 0.5 * (labels.float() - 1)[:, None, None, None], labels


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifier, "_STEPS", 60)
        Classifier.of(*labelled()).save(path)
    return path


@pytest.mark.loss
def test_it_is_trained_saved_and_read_again(monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "_STEPS", 60)
    shown, labels = labelled()
    before = torch.get_rng_state()
    trained = Classifier.of(shown, labels)
    trained.save(tmp_path / "found.safetensors")
    again = Classifier.load(tmp_path / "found.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert trained.accuracy > 0.9 and torch.equal(again(shown), trained(shown))
    assert torch.equal(Classifier.of(shown, labels)(shown), trained(shown))
    assert not torch.equal(Classifier.of(shown, labels, seed=2)(shown), trained(shown))


@pytest.mark.loss
def test_it_is_not_the_network_that_judges(monkeypatch):
    """Also where the judge is trained from the seed of the loss."""
    monkeypatch.setattr(classifier, "_STEPS", 2)
    shown, labels = labelled(40)
    ours, judge = Classifier.of(shown, labels), train_classifier(shown, labels, 3, seed=1)
    assert ours.features(shown)[-1].shape[1] != judge.extract(shown).shape[1]


@pytest.mark.loss
def test_the_features_are_those_of_the_blocks_of_a_grey_image(file):
    found, (shown, _) = load_regularizer(f"classifier('{file}', layers=(2,))"), labelled()
    x0_hat, original = shown[:4], shown[4:8]
    assert isinstance(found, Perceptual) and Term(found, 0.1).name == "classifier"
    one, other = (
        F.normalize(Classifier.load(file).features(value)[2].flatten(2), dim=1) for value in (x0_hat, original)
    )
    expected = (1 - (one * other).sum(1)).mean(1)
    torch.testing.assert_close(found(x0_hat, original_samples=original), expected, rtol=1e-4, atol=1e-6)
    assert found(x0_hat, original_samples=x0_hat).abs().max() == 0


@pytest.mark.loss
def test_the_cross_entropy_is_that_of_the_labels(file):
    found, (shown, labels) = load_regularizer(f"classifier('{file}', kind='cross_entropy')"), labelled()
    assert isinstance(found, Score) and found.needs == ("class_labels",) and Term(found, 0.1).name == "classifier"
    ours = found(shown, class_labels=labels)
    torch.testing.assert_close(ours, F.cross_entropy(Classifier.load(file)(shown), labels, reduction="none"))
    assert ours.mean() < 0.5 < found(shown, class_labels=(labels + 1) % 3).mean()
    assert load_regularizer(f"classifier('{file}', kind='cross_entropy', target=2)").needs == ()


@pytest.mark.loss
def test_the_gradient_reaches_x0_hat_and_not_the_network(file):
    output, noise = images(2, 4, 1, 8, 8, dtype=torch.float32).tanh()
    ours = X0Regularization(scheduler_of("sample"), [Term(load_regularizer(f"classifier('{file}')"), 1.0, constant)])
    ours(output.requires_grad_(), 10, noise, original_samples=noise).loss.backward()
    network = ours.terms[0].regularizer.net
    assert output.grad.abs().sum((1, 2, 3)).min() > 0 and all(weight.grad is None for weight in network.parameters())
    assert not ours.state_dict()


@pytest.mark.loss
def test_large_images_are_averaged_differentiably(file):
    found, large = Classifier.load(file), images(2, 1, 64, 64, dtype=torch.float32).requires_grad_()
    small = F.interpolate(large, 32, mode="bilinear", antialias=True)
    torch.testing.assert_close(found(large), found(small))
    assert torch.autograd.grad(found(large).sum(), large)[0].abs().sum() > 0


@pytest.mark.loss
def test_what_is_no_classifier_is_refused(tmp_path, file, monkeypatch):
    (tmp_path / "text.safetensors").write_text("nothing")
    for name, message in (("missing", "does not exist: write it with"), ("text", "is not a classifier .*: write it")):
        with pytest.raises(ValueError, match=message):
            load_regularizer(f"classifier('{tmp_path / name}.safetensors')")
    with pytest.raises(ValueError, match=r"needs file: it is classifier\(file"):
        load_regularizer("classifier")
    with pytest.raises(ValueError, match="kind must be one of features, cross_entropy, not 'logit'"):
        Classifier.loss(file, kind="logit")
    with pytest.raises(ValueError, match="target=1 is that of kind"):
        Classifier.loss(file, target=1)
    with pytest.raises(ValueError, match="trained on 1 channels, not 3"):
        Classifier.loss(file, kind="cross_entropy", target=1)(torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(classifier, "_STEPS", 2)
    Classifier.of(*labelled(40, channels=2)).save(tmp_path / "fields.safetensors")
    with pytest.raises(ValueError, match="trained on 2 channels, and features need 1 or 3"):
        Classifier.loss(tmp_path / "fields.safetensors")
    with pytest.raises(ValueError, match="at least 2 classes and 20 images"):
        Classifier.of(*labelled(10))
    assert "classifier" in built_in_regularizers()


@pytest.mark.slow
@pytest.mark.training
def test_the_code_of_the_documentation_makes_the_file(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    image_folder(number=20, name="photos")
    code = (
        (ROOT / "docs" / "regularizers.md").read_text().split("<!-- not run: trains for a minute -->\n```python\n")[1]
    )
    exec(code.split("```")[0], {})
    assert "of the held-out images recognised" in capsys.readouterr().out
    assert Classifier.load("classifier.safetensors").channels == 3


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.parametrize("kind", ["features", "cross_entropy"])
def test_a_training_uses_it_by_name(train, file, image_folder, capsys, kind):
    spec = f"classifier('{file}', kind='{kind}')"
    flags = ("--max_train_steps", 10, "--train_data_dir", image_folder(), "--reg_weighting", "constant")
    flags += ("--regularizer", spec)
    if kind == "cross_entropy":
        assert "needs class_labels: add --class_conditional" in refusal(train, capsys, *flags)
        flags += ("--class_conditional",)
    run, without = train(*flags, "--reg_weight", 1), train(*flags, "--reg_weight", 0, output="without")
    assert differ(weights(run), weights(without)) and metrics(run)[0]["raw/classifier"] > 0
    (term,) = json.loads((run / "reg_config.json").read_text())["objective"]["terms"]
    assert term["name"] == "classifier" and term["regularizer"] == spec
