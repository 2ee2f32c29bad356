"""What a regularizer or an estimator is given of unusual containers: the entries of its own images, or all of it."""

from collections import deque

import pandas
import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers.context import Shared, cut, repeat, unwrap
from reg_diffusers.objective import RegularizedLoss, Term

PLACES = torch.tensor([0, 2])


@pytest.mark.parametrize("value", [range(3), deque([0, 1, 2]), pandas.Series([0, 1, 2], index=[2, 1, 0])])
def test_sequences_follow_the_images(value):
    assert list(cut(value, PLACES, 3)) == [0, 2]
    assert list(repeat(value, 2, 3)) == [0, 1, 2, 0, 1, 2]


def test_sequences_of_another_length_are_refused():
    with pytest.raises(ValueError, match="has 4 entries for a batch of 3"):
        cut(range(4), PLACES, 3)


def test_shared_in_a_dictionary_is_unwrapped():
    given = {"added": {"kernel": Shared("k"), "ids": [1, 2]}}
    assert unwrap(given) == {"added": {"kernel": "k", "ids": [1, 2]}}
    assert given["added"]["kernel"] == Shared("k")  # the caller's own stays


def test_an_estimator_asks_the_network_with_shared_arguments_whole():
    seen = []

    def model(sample, timesteps, kernel):
        seen.append(kernel.shape)
        return sample * 0.5

    def ask_again(prediction):
        return prediction.predict(prediction.sample, prediction.timesteps)

    ask_again.calls_model = True
    term = Term(lambda x: x.flatten(1).mean(1), 1.0, name="mean", estimator=ask_again)
    images, timesteps = torch.randn(3, 3, 4, 4, requires_grad=True), torch.tensor([1, 1, 900])
    kwargs = {"kernel": Shared(torch.ones(3, 3))}
    RegularizedLoss(DDPMScheduler(), [term])(model, images, timesteps=timesteps, model_kwargs=kwargs)
    assert seen == [(3, 3), (3, 3)]
