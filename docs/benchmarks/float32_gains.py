"""What a training step in float32 could gain on a CPU: channels-last memory, and fusing GroupNorm with SiLU.

    python docs/benchmarks/float32_gains.py

A small UNet2DModel, batch 8 at 32 x 32, forward and backward on one thread. Steps with both orders of memory take
turns; their CPU times are compared, so that other programs on the machine matter little. PyTorch has no fused kernel
for GroupNorm and SiLU: their share of a step, by the profiler, is the most that a fusion could save.

The result is printed and kept in float32_gains.txt beside this file.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch.profiler import ProfilerActivity, profile

ROUNDS, BATCH = 9, 8
PARTS = {"GroupNorm": ("aten::native_group_norm",), "SiLU": ("aten::silu", "aten::silu_backward")}


def main() -> None:
    torch.set_num_threads(1)
    network, images, timesteps = small_network_and_batch()
    forms = {"as it is": torch.contiguous_format, "channels last": torch.channels_last}
    steps = {}
    for name, memory_format in forms.items():
        own = copy.deepcopy(network).to(memory_format=memory_format)
        batch = images.to(memory_format=memory_format)
        steps[name] = lambda own=own, batch=batch: own(batch, timesteps).sample.square().mean().backward()
    times = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    ratios = sorted(one / other for one, other in zip(*(taken[1:] for taken in times.values()), strict=True))
    lines = [f"torch {torch.__version__}, float32, 1 thread, CPU time, {ROUNDS} pairs"]
    lines += [f"  {name:<16}{1000 * statistics.median(taken[1:]):7.0f} ms" for name, taken in times.items()]
    lines.append(f"  channels last is {statistics.median(ratios):.2f} x as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for part, share in shares(steps["as it is"]).items():
        lines.append(f"  {part:<16}{100 * share:6.1f} % of a step, forward and backward")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".txt").write_text(text)
    print(text, end="")


def small_network_and_batch() -> tuple[UNet2DModel, torch.Tensor, torch.Tensor]:
    """The network, images and timesteps of a step."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )
    return network, torch.randn(BATCH, 3, 32, 32), torch.randint(0, 1000, (BATCH,))


def shares(step) -> dict[str, float]:
    """Shares of the parts in the time of three steps."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            step()
    events = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    whole = sum(events.values())
    return {
        part: sum(value for key, value in events.items() if key.startswith(names)) / whole
        for part, names in PARTS.items()
    }


if __name__ == "__main__":
    main()
