"""How well x0_hat fits its prompt, by a frozen CLIP model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frozen import FrozenNetworks
from ..precision import input_dtype
from .network_input import NetworkInput, checked_range, in_colour, read_processor

__all__ = ["PromptSimilarity"]

_PROMPTS_KEPT = 10_000


class PromptSimilarity(nn.Module):
    r"""Compares x0_hat with its prompt: L' = 1 - cos(f(x0_hat), g(prompt)), from 0 to 2.

        Term(PromptSimilarity.from_pretrained("openai/clip-vit-base-patch32"), weight=0.01)  # the loop passes prompt

    f and g are the image and the text features of CLIP. Their cosine hardly exceeds 0.4 even for a photograph and its
    caption (Hessel et al. 2021, arXiv:2104.08718), so compare with L' of the data, and use `threshold` to leave alone
    what is as good. It judges x0_hat alone, which is a mean of many images at high noise: keep the weighting
    `matched`. Patterns that people do not see lower it, too, and a CLIP score by the same network is flattered: judge
    with another one.

    The features of a prompt are computed once, each prompt by itself, and kept for the last 10,000 distinct prompts.
    The text is padded, or cut with a warning, to the length of the model. Images are mapped to the network's input as
    `network_input.NetworkInput` describes. The network is frozen, in evaluation mode, moved by `.to(device)` and
    absent from `parameters` and `state_dict`. It runs in its own dtype.

    Source: Radford et al. 2021 (arXiv:2103.00020), sec. 2.3.

    Args:
        net: a CLIPModel of transformers.
        tokenizer: its tokenizer.
        processor: its image processor, or a dictionary of its numbers.
        prompt: text for all images. None: `prompt` is in `needs`, a list with the text of each image, or one text.
        input_range: range of the images, "[-1, 1]" or "[0, 1]".

    Raises:
        TypeError: `net` has no image and text features.
        ValueError: `input_range` is unknown.
    """

    __name__ = "prompt_similarity"

    def __init__(
        self, net: nn.Module, tokenizer, processor, prompt: str | None = None, *, input_range: str = "[-1, 1]"
    ):
        super().__init__()
        if not (hasattr(net, "get_image_features") and hasattr(net, "get_text_features")):
            raise TypeError(f"PromptSimilarity needs a CLIPModel of transformers, not {type(net).__name__}")
        self.networks = FrozenNetworks([net])
        self.tokenizer = tokenizer
        self.network_input = NetworkInput.of(processor)
        self.prompt = prompt
        self.input_range = checked_range(input_range)
        self.needs = ("prompt",) if prompt is None else ()
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str,
        prompt: str | None = None,
        *,
        input_range: str = "[-1, 1]",
        dtype: torch.dtype = torch.float32,
    ) -> PromptSimilarity:
        """Loads a CLIPModel, its tokenizer and the numbers of its image processor with transformers.

        Args:
            name_or_folder: a model id on the Hub, or a folder. No code from it is run.
            prompt, input_range: as for the class.
            dtype: dtype in which the network runs.

        Raises:
            OSError: the model, its tokenizer or its preprocessor_config.json was not found.
        """
        from transformers import AutoTokenizer, CLIPModel

        net = CLIPModel.from_pretrained(name_or_folder, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
        return cls(net, tokenizer, read_processor(name_or_folder), prompt, input_range=input_range)

    @property
    def net(self) -> nn.Module:
        """The network."""
        (net,) = self.networks
        return net

    def forward(self, x0_hat: Tensor, /, *, prompt: str | Sequence[str] | None = None) -> Tensor:
        """Computes the loss of each image, (n,).

        Args:
            x0_hat: (n, C, H, W), C 1 or 3.
            prompt: n texts, or one for all; without a text of its own only.

        Raises:
            ValueError: the images have another number of channels, or there are neither 1 nor n texts.
        """
        prompts = prompt if self.prompt is None else self.prompt
        prompts = [prompts] * len(x0_hat) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(x0_hat):
            raise ValueError(f"prompt has {len(prompts)} texts for {len(x0_hat)} images: pass one per image")
        images = x0_hat.to(torch.promote_types(x0_hat.dtype, torch.float32))
        images = self.network_input(in_colour(images, self.input_range, type(self).__name__))
        own_size = images.shape[-1] == images.shape[-2] == self.net.config.vision_config.image_size
        shown = images.to(input_dtype(self.net, images))
        found = _pooled(self.net.get_image_features(pixel_values=shown, interpolate_pos_encoding=not own_size))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        expected = torch.stack([self._text_feature(text) for text in prompts]).to(found)
        return 1 - F.cosine_similarity(found, expected, dim=1)

    @torch.no_grad()
    def _text_feature(self, text: str) -> Tensor:
        """Computes the features of a prompt, (D,); alone, so that they do not depend on the others of a batch."""
        if text not in self._text_features:
            length = self.net.config.text_config.max_position_embeddings
            if (count := len(self.tokenizer(text)["input_ids"])) > length:
                warnings.warn(
                    f"PromptSimilarity: the prompt {text[:40]!r}... has {count} tokens, of which the network reads the"
                    f" first {length}",
                    stacklevel=3,
                )
            tokens = self.tokenizer(
                text, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.net.device)
            if len(self._text_features) >= _PROMPTS_KEPT:
                del self._text_features[next(iter(self._text_features))]
            self._text_features[text] = _pooled(self.net.get_text_features(**tokens))[0]
        return self._text_features[text]


def _pooled(found) -> Tensor:
    """Returns the projected features, which some versions of transformers return in an output object."""
    return found if isinstance(found, Tensor) else found.pooler_output
