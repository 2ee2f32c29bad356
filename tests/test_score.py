"""Class scores and rewards of x0_hat by a frozen network."""

import pytest
import torch
import transformers
from losses import images, scheduler_of
from torch import nn

from reg_diffusers import Term, X0Regularization, weighting
from reg_diffusers.regularizers import Score
from reg_diffusers.regularizers.network_input import NetworkInput

pytestmark = pytest.mark.loss


def classifier(classes=3, channels=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def test_it_is_the_cross_entropy_of_the_class():
    net, x = classifier().double(), images(3, 2, 6, 6)
    log_p = net(x).log_softmax(1)
    torch.testing.assert_close(Score(net, 2)(x), -log_p[:, 2])
    labels = torch.tensor([0, 2, 1])
    torch.testing.assert_close(Score(net)(x, class_labels=labels), -log_p[range(3), labels])


def test_it_is_what_a_reward_lacks():
    net, x = classifier(classes=1).double(), images(3, 2, 6, 6)
    rewards = net(x).flatten().tolist()
    threshold = sorted(rewards)[1]
    expected = [max(threshold - reward, 0) for reward in rewards]
    assert Score(net, kind="reward", threshold=threshold)(x).tolist() == pytest.approx(expected)
    assert sorted(expected)[:2] == [0, 0] and max(expected) > 0


@pytest.mark.parametrize("options", [{"target": 1}, {"kind": "reward", "threshold": 100.0}])
def test_gradients_are_those_of_the_value(options):
    net = classifier(classes=1 if "kind" in options else 3).double()
    assert torch.autograd.gradcheck(Score(net, **options), images(2, 2, 5, 5).requires_grad_())


def test_a_model_of_transformers_sees_what_its_processor_makes():
    config = transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, layer_type="basic")
    net = transformers.ResNetForImageClassification(config).eval()
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 24})
    x = images(2, 1, 16, 16, dtype=torch.float32).clamp(-1, 1)
    shown = NetworkInput.of(processor)(((x + 1) / 2).expand(-1, 3, -1, -1))
    expected = -net(shown).logits.log_softmax(1)[:, 1]
    torch.testing.assert_close(Score(net, 1, processor=processor)(x), expected)
    unit = Score(net, 1, processor=processor, input_range="[0, 1]")((x + 1) / 2)
    torch.testing.assert_close(unit, expected)


def test_in_training_labels_follow_the_images_and_the_network_is_frozen():
    net = classifier(channels=1)
    output, noise = images(2, 4, 1, 6, 6, dtype=torch.float32)
    output.requires_grad_()
    term = Term(Score(net), 1.0, lambda level: torch.tensor([0.0, 1.0, 0.0, 1.0]))
    ours = X0Regularization(scheduler_of("sample"), [term]).train()
    assert ours.needs == ("class_labels",) and not ours.state_dict() and not net.training
    labels = torch.tensor([0, 1, 2, 2])
    found = ours(output, 10, noise, class_labels=labels)
    expected = nn.functional.cross_entropy(net(output[1::2]), labels[1::2], reduction="sum") / 4
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    assert output.grad.abs().sum() > 0 and all(weight.grad is None for weight in net.parameters())
    assert Term(Score(net, 1), 1.0, weighting.matched).needs == ()


def test_half_precision_images():
    net, x = classifier(), images(2, 2, 6, 6)
    found = Score(net, 0)(x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Score(net, 0)(x.float()), rtol=0.02, atol=0)


def test_what_is_no_score_is_refused():
    with pytest.raises(ValueError, match="kind must be one of cross_entropy, reward, not 'logit'"):
        Score(classifier(), kind="logit")
    with pytest.raises(ValueError, match="a reward has no target class, but target=1"):
        Score(classifier(), 1, kind="reward")
    with pytest.raises(ValueError, match=r"a reward model must return \(2,\), not \(2, 3\)"):
        Score(classifier(), kind="reward")(images(2, 2, 6, 6, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"a classifier must return logits \(2, K\), not \(2, 2, 6, 6\)"):
        Score(nn.Identity(), 1)(images(2, 2, 6, 6))
    with pytest.raises(ValueError, match="Score needs pictures of 1 or 3 channels"):
        processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        Score(classifier(), 1, processor=processor)(images(2, 2, 6, 6))
