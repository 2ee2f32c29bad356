"""LoRA (Hu et al. 2021, arXiv:2106.09685): trained low-rank adapters on a frozen network, by peft.

A layer W of an adapted network computes W x + (alpha / r) B A x, with A of r rows and B of r columns. B starts at 0,
so the network starts as the given one.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..runtime.errors import UsageError
from ..sampling.sampler import add_tensors
from ..settings.model import ModelSettings
from .families import Family
from .trained import trained_parameters

__all__ = ["add_lora", "frozen_dtype", "frozen_sha256", "keep_trained_only", "load_with_lora", "lora_file_arguments"]

_FILE = "model.safetensors"


def load_with_lora(
    family: Family, settings: ModelSettings, cache_dir: str | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Loads the network of --pretrained_model_name_or_path, a pipeline of this family, and adds adapters.

    Args:
        family: family of the pipeline.
        settings: settings of the model.
        cache_dir: folder of downloads.
        dtype: dtype of the frozen weights; those of the adapters are float32.

    Raises:
        UsageError: peft is not installed, or no layer has one of the given names.
    """
    if find_spec("peft") is None:
        raise UsageError("--lora_rank needs a package that is not installed: pip install peft")
    network = family.load_network(settings.pretrained_model_name_or_path, cache_dir, dtype)
    add_lora(network, settings, family.target_modules)
    return network


def add_lora(network: nn.Module, settings: ModelSettings, default_modules: tuple[str, ...]) -> None:
    """Freezes a network and adds adapters, which are its only trained parameters.

    Args:
        network: a network of diffusers.
        settings: the settings with lora_rank, lora_alpha (default: the rank) and lora_target_modules.
        default_modules: endings of the names of the adapted layers if lora_target_modules is not set.

    Raises:
        UsageError: no layer has one of the default names, or one of the given names is that of no layer.
    """
    from peft import LoraConfig

    network.requires_grad_(False)
    modules = settings.lora_target_modules or default_modules
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=list(modules),
    )
    names = [f".{name}" for name, _ in network.named_modules()]
    wrong = [end for end in settings.lora_target_modules or () if not any(name.endswith(f".{end}") for name in names)]
    try:
        if wrong:
            raise ValueError(f"no layer ends in {', '.join(wrong)}")
        network.add_adapter(config)
    except ValueError as error:
        linear = (name for name, layer in network.named_modules() if isinstance(layer, nn.Linear))
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise UsageError(
            f"--lora_target_modules {' '.join(modules)}: no adapter can be added there; linear layers of this network"
            f" end in {', '.join(ends)} ({' '.join(str(error).split())[:120]})"
        ) from error
    for parameter in trained_parameters(network):
        parameter.data = parameter.data.float()  # peft gives them the dtype of the layer


def lora_file_arguments(network: nn.Module, component: str) -> dict:
    """Returns the arguments of `save_lora_weights` of a pipeline: the adapters, and their rank and alpha.

    Raises:
        ValueError: the network has no adapters, or several sets of them.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    adapters = getattr(network, "peft_config", {})
    if not adapters:
        raise ValueError(
            "the network has no LoRA weights, and others are not saved here: save the pipeline by diffusers"
        )
    if len(adapters) > 1:
        raise ValueError(f"the network has several LoRA weights ({', '.join(adapters)}): delete_adapters all but one")
    ((name, config),) = adapters.items()
    layers = get_peft_model_state_dict(network, adapter_name=name)
    layers = {key: tensor.float().cpu() for key, tensor in layers.items()}
    if component == "unet":  # as diffusers' training scripts do
        layers = convert_state_dict_to_diffusers(layers)
    return {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": config.to_dict()}


def frozen_dtype(network: nn.Module) -> torch.dtype:
    """Returns the dtype of the frozen parameters of an adapted network; of the others if none is frozen."""
    return min(network.parameters(), key=lambda value: value.requires_grad).dtype


def frozen_sha256(network: nn.Module) -> str | None:
    """Returns a hash of the frozen parameters, which checkpoints of adapters lack; None if there are none."""
    frozen = {name: value for name, value in network.named_parameters() if not value.requires_grad}
    if not frozen:
        return None
    digest = hashlib.sha256()
    add_tensors(digest, frozen)
    return digest.hexdigest()


def keep_trained_only(accelerator: Accelerator, network: nn.Module) -> None:
    """Lets checkpoints hold only the trained parameters of a network with frozen ones; does nothing for others.

    Args:
        accelerator: the accelerator of the training, which saves one network.
        network: the network, as prepared by the accelerator.
    """
    network = accelerator.unwrap_model(network)
    if all(parameter.requires_grad for parameter in network.parameters()):
        return

    def trained() -> dict[str, Tensor]:
        return {name: value for name, value in network.named_parameters() if value.requires_grad}

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # accelerate saves what is left
        if accelerator.is_main_process:
            values = {name: value.detach().cpu().contiguous() for name, value in trained().items()}
            save_file(values, Path(folder) / _FILE)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()  # accelerate loads what is left
        saved, now = load_file(Path(folder) / _FILE), trained()
        if saved.keys() != now.keys():
            raise UsageError(f"--resume: {folder} has adapters in other layers: see --lora_target_modules")
        if any(saved[name].shape != value.shape for name, value in now.items()):  # copy_ would repeat rank 1
            raise UsageError(f"--resume: {folder} has adapters of another rank: see --lora_rank")
        for name, value in now.items():
            value.data.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
