"""Memory and communication per GPU for three sizes of networks, with the loss on the decoded picture: on paper.

    python docs/benchmarks/scaling_on_paper.py

Nothing is timed, and no GPU is needed. Per parameter, a GPU without sharding holds float32 weights, gradients, the two
moments of AdamW and the moving average: 20 bytes. Activations of the UNet of train_unconditional.py are those that
autograd saves on the meta device; those of a transformer are 34 bytes per token, channel and layer in bf16 with fused
attention (Korthikanti et al. 2022, arXiv:2205.05198), or 2 with a checkpoint per layer and one layer in full. The
decoded view adds the weights of Stable Diffusion's decoder and the peak of decoding one image, as in
decoding_memory.txt; it has no gradients to send.

A GPU sends per step, for P parameters and N GPUs: without sharding 2 (N-1)/N 4P bytes, the gradients' all-reduce; with
FSDP2 (N-1)/N (2 + 2 + 4) P, two gathers in bf16 and gradients in float32; with HSDP the same among the 8 GPUs of a
machine, and 2 (M-1)/M 4P/8 to the M machines. Seconds are bytes over bandwidth: a bound, as part of it overlaps with
the computation.

The result is printed and kept in scaling_on_paper.txt beside this file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel

GIB, GPUS, MACHINES = 2**30, 8, 4
NVLINK, NETWORK = 450e9, 50e9  # bytes per second and GPU, one way: NVLink of an H100; 400 Gb/s
STATE = 4 + 4 + 8 + 4  # bytes per parameter: weights, gradients, AdamW, average
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        name: its name in the table.
        parameters: P.
        layers: number of layers, each gathered as a whole.
        images: images per GPU and step.
        activations: bytes that the backward pass of these images needs.
        view: bytes of the decoded view.
    """

    name: str
    parameters: int
    layers: int
    images: int
    activations: float
    view: float


def main() -> None:
    cases = [unet(images=64), transformer("1B", 30, 1664, 512, 8), transformer("12B", 47, 4608, 1024, 1)]
    lines = [f"{GPUS} GPUs per machine, HSDP over {MACHINES} machines; GiB per GPU, GB sent per GPU and step, seconds"]
    lines.append(f"{'':<30}{'state':>8}{'activ.':>8}{'view':>8}{'sum':>8}{'NVLink':>10}{'':>7}{'network':>10}")
    for case in cases:
        lines.append(f"{case.name}, images per GPU: {case.images}")
        for name, (state, inside, across) in schemes(case).items():
            parts = [state, case.activations, case.view]
            numbers = "".join(f"{part / GIB:8.1f}" for part in [*parts, sum(parts)])
            sent = f"{inside / 1e9:10.1f} {inside / NVLINK:5.2f}s{across / 1e9:10.1f} {across / NETWORK:5.2f}s"
            lines.append(f"  {name:<28}{numbers}{sent}" + ("  > 80 GB" if sum(parts) > 80e9 else ""))
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".txt").write_text(text)
    print(text, end="")


def schemes(case: Case) -> dict[str, tuple[float, float, float]]:
    """By scheme: bytes of the state, and bytes sent inside a machine and between machines, per GPU."""
    count, share = case.parameters, (GPUS - 1) / GPUS
    gathered = 2 * 2 * count / case.layers  # one layer in bf16, and the next one
    sharded = STATE * count / GPUS + gathered
    return {
        "DDP, 8 GPUs": (STATE * count, 2 * share * 4 * count, 0),
        "FSDP2, 8 GPUs": (sharded, share * 8 * count, 0),
        "HSDP, 4 x 8 GPUs": (sharded, share * 8 * count, 2 * (MACHINES - 1) / MACHINES * 4 * count / GPUS),
        "FSDP2, 32 GPUs": (STATE * count / 32 + gathered, 0, 31 / 32 * 8 * count),
    }


def unet(images: int) -> Case:
    """The network of diffusers' train_unconditional.py at 64 x 64; the loss sees its pixels, so nothing is decoded."""
    config = json.loads((HERE / "gpu" / "train_unconditional.json").read_text())
    with torch.device("meta"):
        network = UNet2DModel.from_config(config).to(torch.bfloat16)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    sample = torch.empty(1, 3, 64, 64, device="meta", dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(sample, torch.zeros(1, device="meta"))
    saved = sum(storage.nbytes() for key, storage in storages.items() if key not in own)
    count = sum(parameter.numel() for parameter in network.parameters())
    layers = sum(type(module).__name__ == "ResnetBlock2D" for module in network.modules())
    return Case("UNet, 113.7M, 64 px", count, layers, images, images * saved, 0.0)


def transformer(name: str, layers: int, width: int, pixels: int, images: int) -> Case:
    """A transformer on 2 x 2 patches of latents of an autoencoder like Stable Diffusion's, checkpointed by layer."""
    tokens = (pixels // 16) ** 2
    activations = images * tokens * width * (2 * layers + 34)
    peak = {512: 1.53, 1024: 6.10}[pixels] * GIB  # decoding_memory.txt, bfloat16, one image at a time
    decoder = 49.5e6 * 2
    count = 12 * layers * width**2
    return Case(f"transformer, {name}, {pixels} px", count, layers, images, activations, peak + decoder)


if __name__ == "__main__":
    main()
