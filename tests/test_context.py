"""What follows the images of a batch, and what all of them share."""

import functools

import numpy as np
import pytest
import torch
from losses import images, mean_square, scheduler_of
from transformers import BatchEncoding

from reg_diffusers import Shared, Term, TermError, X0Regularization, needs_of, weighting
from reg_diffusers.context import cut, repeat

pytestmark = pytest.mark.loss

MIDDLE = torch.tensor([1, 2])


def test_prompts_and_token_ids_follow_the_images():
    """A loss on text gets the prompts of the images that it looks at, and of no others."""
    seen = []

    def recording(x0_hat, *, prompts, tokens, encoding, names, array):
        seen.append((prompts, tokens, encoding, names, array))
        return mean_square(x0_hat)

    recording.needs = ("prompts", "tokens", "encoding", "names", "array")
    ids, output, sample = torch.arange(12).reshape(4, 3), *images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of("sample"), [Term(recording, 1.0, weighting.low_noise)])
    regularization(
        output,
        torch.tensor([500, 0, 199, 999]),
        sample,
        prompts=["a", "b", "c", "d"],
        tokens={"ids": ids, "nested": {"mask": ids > 3}, "padding": "right"},
        encoding=BatchEncoding({"input_ids": ids}),
        names=("one", "two", "three", "four"),
        array=np.arange(4),
    )
    ((prompts, tokens, encoding, names, array),) = seen
    assert prompts == ["b", "c"]
    assert names == ("two", "three")
    assert array.tolist() == [1, 2]
    assert torch.equal(tokens["ids"], ids[1:3])
    assert torch.equal(tokens["nested"]["mask"], ids[1:3] > 3)
    assert tokens["padding"] == "right"
    assert isinstance(encoding, BatchEncoding)
    assert torch.equal(encoding["input_ids"], ids[1:3])


def test_a_kernel_is_shared_whatever_the_batch_size():
    seen = []

    def filtered(x0_hat, *, kernel):
        seen.append(kernel)
        return mean_square(x0_hat)

    filtered.needs = ("kernel",)
    regularization = X0Regularization(scheduler_of("sample"), [Term(filtered, 1.0, weighting.low_noise)])
    kernel = images(3, 3)
    for timesteps in ([0, 500, 0], [0, 0, 500, 999]):
        output, sample = images(2, len(timesteps), 1, 3, 2)
        regularization(output, torch.tensor(timesteps), sample, kernel=Shared(kernel))
    assert all(torch.equal(found, kernel) for found in seen)
    output, sample = images(2, 4, 1, 3, 2)
    with pytest.raises(ValueError, match=r"kernel has 3 entries for a batch of 4.*Shared\(kernel\)"):
        regularization(output, torch.zeros(4, dtype=torch.long), sample, kernel=kernel)


@pytest.mark.parametrize("value", [2.0, "a name", None, torch.tensor(2.0), torch.ones(1, 1, 3, 2)])
def test_numbers_words_and_what_broadcasts_are_left_whole(value):
    assert cut(value, MIDDLE, 4) is value


def test_repeating_goes_over_whole_batches():
    rows = torch.arange(2)
    repeated = repeat({"rows": rows, "words": ["a", "b"], "kernel": Shared(rows), "scale": 2.0}, 2, batch_size=2)
    assert repeated["rows"].tolist() == [0, 1, 0, 1]
    assert repeated["words"] == ["a", "b", "a", "b"]
    assert repeated["kernel"].value is rows
    assert repeated["scale"] == 2.0


def test_timesteps_and_noise_reach_a_regularizer_that_asks_for_them():
    seen = []

    def recording(x0_hat, *, timesteps, noise):
        seen.append((timesteps, noise))
        return mean_square(x0_hat)

    recording.needs = ("timesteps", "noise")
    output, sample, noise = images(3, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of("sample"), [Term(recording, 1.0, weighting.low_noise)])
    regularization(output, torch.tensor([500, 7, 8, 999]), sample, noise=noise)
    ((timesteps, of_images),) = seen
    assert timesteps.tolist() == [7, 8]
    assert torch.equal(of_images, noise[1:3])


def test_a_partial_leaves_open_what_it_does_not_bind():
    def masked(x0_hat, *, mask, factor):
        return factor * mean_square(x0_hat * mask)

    masked.needs = ("mask", "factor")
    assert needs_of(functools.partial(masked, factor=2.0)) == ("mask",)
    own = functools.partial(masked, factor=2.0)
    own.needs = ("mask",)
    assert needs_of(functools.partial(own)) == ("mask",)
    output, sample = images(2, 4, 1, 3, 2)
    term = Term(functools.partial(masked, factor=2.0), 1.0, weighting.constant)
    doubled = X0Regularization(scheduler_of("sample"), [term])(output, 0, sample, mask=torch.ones(4, 1, 1, 1))
    torch.testing.assert_close(doubled.loss, 2 * mean_square(output).mean())


@pytest.mark.parametrize("needs", ["mask", 3, ("mask", 3)])
def test_needs_is_a_sequence_of_names(needs):
    def masked(x0_hat, *, mask):
        return mean_square(x0_hat * mask)

    masked.needs = needs
    with pytest.raises(TermError, match=r"needs of regularizer 'masked' must be a tuple of names"):
        Term(masked, 1.0)


def test_an_unknown_keyword_is_a_type_error_with_the_nearest_name():
    def masked(x0_hat, *, mask):
        return mean_square(x0_hat * mask)

    masked.needs = ("mask",)
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(masked, 1.0)])
    with pytest.raises(TypeError, match=r"'maks', which no term lists in needs; did you mean 'mask'\?"):
        regularization(output, 0, sample, maks=torch.ones(4, 1, 1, 1))
    with pytest.raises(TypeError, match="did you mean 'image_mask'"):
        regularization(output, 0, sample, mask=1.0, imagemask=torch.ones(4, dtype=torch.bool))
