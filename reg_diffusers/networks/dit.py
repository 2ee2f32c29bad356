"""DiT (Peebles and Xie 2022, arXiv:2212.09748): a transformer with class labels in latents, saved as a DiTPipeline.

A DiTTransformer2DModel of diffusers embeds C = num_embeds_ada_norm classes and one label more, C, of no class, for
classifier-free guidance. DiTPipeline takes 1000 for that label, so new networks have C = 1000 even for fewer classes.
diffusers drops labels in each block on its own; here the training drops them, for the whole network at once, with the
probability --condition_dropout.

A network may have twice the output channels: the second half is a learned variance. Neither the denoising loss nor L'
sees it, so it is not trained, and as in DiTPipeline no sampler uses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..data.buckets import Buckets
from ..data.training_data import TrainingData
from ..hub.model_index import (
    check_components,
    check_saved_schedule,
    check_weights,
    own_entries,
    saved_class_names,
    with_own_entries,
)
from ..learned_variance import learns_variance
from ..runtime.errors import UsageError, warn
from ..settings.data import DataSettings
from .fit import check_sides
from .latent_pipeline import LatentPipeline

__all__ = ["RegDiTPipeline", "as_called", "build", "check_settings", "load", "new_config", "notes", "of_image_alone"]
__all__ += ["warn_of_names"]

_LABELS = 1000  # DiTPipeline takes this label for no class
_STD_OF_EMBEDDINGS = 0.02  # of their first weights, as in the paper


def as_called(network: Callable, config: Mapping, classes: int) -> Callable:
    """Returns the network as a loss calls it: (noisy_samples, timesteps, class_labels=) -> (model_output,).

    Args:
        network: a `DiTTransformer2DModel`, possibly wrapped.
        config: its config.
        classes: number of classes of the data; from this label on, labels stand for no class.
    """
    no_class = config["num_embeds_ada_norm"]

    def called(sample: Tensor, timesteps: Tensor, *, class_labels: Tensor, return_dict: bool = False):
        labels = torch.where(class_labels < classes, class_labels, no_class)
        output = network(sample, timesteps, class_labels=labels, return_dict=False)[0]
        return (output[:, : sample.shape[1]],)  # without a learned variance

    return called


def new_config(config: Mapping) -> dict:
    """Returns the config of a new network: with an embedding for at least the classes that DiTPipeline expects."""
    return {**config, "num_embeds_ada_norm": max(config.get("num_embeds_ada_norm") or _LABELS, _LABELS)}


def load(path: str, cache_dir: str | None, subfolder: str = "") -> DiTTransformer2DModel:
    """Loads a network, from safetensors only."""
    check_weights(Path(path, subfolder))
    return DiTTransformer2DModel.from_pretrained(path, subfolder=subfolder, cache_dir=cache_dir, use_safetensors=True)


def build(given: DiTTransformer2DModel | None, config: Mapping | None, data: TrainingData) -> DiTTransformer2DModel:
    """Returns the given network, or a new one with this config, for the latents and classes of the data.

    Args:
        given: the network to fine-tune; None for a new one.
        config: the config of a new network, see `new_config`; its sizes and channels are replaced.
        data: data of the training.

    Raises:
        UsageError: the data do not fit the network, or the config is invalid.
    """
    channels, side, _ = data.shape
    for part in data.parts if isinstance(data, Buckets) else [data]:
        _, height, width = part.shape
        if height != width:
            raise UsageError(
                f"--resolution: a DiTTransformer2DModel draws squares only, not {width} x {height} latents"
            )
    embeddings, wanted = (config or given.config)["num_embeds_ada_norm"], len(data.classes)
    if wanted > embeddings:
        fix = f"set num_embeds_ada_norm in its config to {wanted}" if given is None else "train a new model"
        raise UsageError(f"the given model embeds {embeddings:,} classes, but the data have {wanted:,}: {fix}")
    if given is None:
        network = _new({**config, "in_channels": channels, "out_channels": channels, "sample_size": side})
    elif given.config.sample_size != side:  # the embeddings of the places follow from the size
        network = DiTTransformer2DModel.from_config({**given.config, "sample_size": side})
        network.load_state_dict(given.state_dict())
    else:
        network = given
    multiple = network.config.patch_size
    check_sides(multiple, data, f"the network divides the resolution into patches of {multiple}")
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # which would drop the label of an image in some blocks only
    return network


def _new(config: dict) -> DiTTransformer2DModel:
    try:
        network = DiTTransformer2DModel.from_config(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--model_config_name_or_path: not a config of DiTTransformer2DModel: {reason}") from error
    _initialize(network)
    return network


@torch.no_grad()
def _initialize(network: DiTTransformer2DModel) -> None:
    """Draws the first weights as the paper does (adaLN-Zero): each block is the identity, and the output is 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(network.pos_embed.proj.bias)
    zero = [network.proj_out_1, network.proj_out_2]
    for block in network.transformer_blocks:
        of_time = block.norm1.emb.timestep_embedder
        tables = (block.norm1.emb.class_embedder.embedding_table, of_time.linear_1, of_time.linear_2)
        for module in tables:
            nn.init.normal_(module.weight, std=_STD_OF_EMBEDDINGS)
        zero.append(block.norm1.linear)
    for module in zero:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def of_image_alone(scheduler):
    """Returns a scheduler for the output without a learned variance, which is not used."""
    if not learns_variance(scheduler.config):
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type="fixed_small")


def check_settings(data: DataSettings, vae: nn.Module | None) -> None:
    """Raises `UsageError` for a training of a DiT without latents or without classes."""
    if vae is None:
        raise UsageError("a DiTTransformer2DModel works in latents: name an autoencoder by --vae")
    if not data.class_conditional:
        raise UsageError("a DiTTransformer2DModel needs a class for each image: pass --class_conditional")


def warn_of_names(names: list[str] | None, data: TrainingData) -> None:
    """Warns if the classes of the data take the embeddings of others, by the names of those."""
    pairs = enumerate(zip(names or (), data.classes, strict=False))
    if changed := next(((number, pair) for number, pair in pairs if pair[0] != pair[1]), None):
        number, (before, now) = changed
        warn(
            f"the classes of the data take the embeddings 0 to {len(data.classes) - 1} of the given model, which stand"
            f" for other classes: {number} was {before!r} and is {now!r}"
        )


def notes(
    network: DiTTransformer2DModel, config: Mapping | None, classes: int, *, drops_labels: bool, is_flow: bool
) -> list[str]:
    """Returns what a run with this network says at its start, a line each.

    Args:
        network: the network, as built.
        config: the config that a new network was built from.
        classes: number of classes of the data.
        drops_labels: whether some images are trained without their label.
        is_flow: whether it is trained by flow matching.
    """
    lines, own = [], network.config
    embeddings = own.num_embeds_ada_norm
    if embeddings > classes:
        lines.append(
            f"{embeddings:,} class embeddings, of which the data use {classes}; label {embeddings} is no class"
        )
    if own.out_channels and own.out_channels != own.in_channels:
        lines.append(
            f"the last {own.out_channels - own.in_channels} output channels, a learned variance, are kept as they are:"
            " no loss sees them, and no sampler uses them"
        )
    if config is not None and config.get("out_channels") not in (None, own.out_channels):
        lines.append(
            f"out_channels {own.out_channels} instead of the {config['out_channels']} of the config: a new network is"
            " trained without a learned variance"
        )
    if not drops_labels:
        lines.append(
            "labels are not dropped: for classifier-free guidance, which DiTPipeline uses by default"
            " (guidance_scale=4), train with --condition_dropout 0.1"
        )
    if is_flow:
        lines.append("DiTPipeline has no sampler for flow matching: sample with reg-diffusers or RegDiTPipeline")
    return lines


class RegDiTPipeline(LatentPipeline):
    """Generates images of given classes with a DiT in latents, steered by losses on the decoded image.

        pipeline = RegDiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        output = pipeline(class_labels=["golden retriever"], guidance_scale=4.0, num_inference_steps=50)

    The call is that of `RegDDPMPipeline`. With the same scheduler, steps, guidance_scale and generator, the images
    equal those of `DiTPipeline` up to rounding; here the default is no guidance. On disk the class is "DiTPipeline".
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> RegDiTPipeline:
        """Loads a DiTPipeline, from safetensors only.

        Raises:
            ValueError: the weights are pickled, the noise schedule requires tables of gigabytes, or model_index.json
                names a module that is not imported yet.
        """
        source = str(pretrained_model_name_or_path)
        where = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
        index = DiTPipeline.load_config(source, **where)
        check_components(index)
        check_saved_schedule(source, kwargs)
        for part in ("transformer", "vae"):
            check_weights(Path(source, part))
        stock = DiTPipeline.from_pretrained(source, use_safetensors=True, **kwargs)
        names, white = saved_class_names(index), own_entries(index)["white"]
        pipeline = cls(stock.transformer, of_image_alone(stock.scheduler), None, stock.vae, names, white)
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    def _save_files(self, folder: Path, *how) -> None:
        """Saves a DiTPipeline with the names of the classes, which diffusers loads."""
        DiTPipeline(self.unet, self.vqvae, self.scheduler).save_pretrained(str(folder), *how)
        path = folder / "model_index.json"
        index = with_own_entries(json.loads(path.read_text()), self.config)
        if names := self.config.class_names:
            index["id2label"] = {str(label): name for label, name in enumerate(names)}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @property
    def num_classes(self) -> int:
        return len(self.config.class_names or ()) or self.unet.config.num_embeds_ada_norm

    def as_in_loss(self) -> Callable:
        """Returns the network as a loss calls it, see `as_called`."""
        return as_called(self.unet, self.unet.config, self.num_classes)

    @property
    def _class_embeddings(self) -> int:
        return self.num_classes + 1  # the label after the last class stands for none

    @property
    def _channels(self) -> int:
        return self.unet.config.in_channels
