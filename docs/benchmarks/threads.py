"""Does the number of threads, or how they wait for each other, change the speed of a training step in float32?

    python docs/benchmarks/threads.py

The network and batch of float32_gains.py, forward and backward. Each measurement is a process of its own, because
OMP_WAIT_POLICY is read once, when PyTorch is loaded: two steps to warm up, then the median of five, in wall time, as
waiting costs processor time by design. The settings take turns for some rounds, so measure on a quiet machine.
"active" threads spin until there is work again; "passive" ones sleep; without the variable they spin for a while.

The result is printed and kept in threads.txt beside this file.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, STEPS = 5, 5
POLICIES = ("unset", "active", "passive")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    settings = [(1, "unset"), *((cores, policy) for policy in POLICIES)]
    times = {setting: [] for setting in settings}
    for _ in range(ROUNDS):
        for setting in settings:
            times[setting].append(measured(*setting))
    usual = times[cores, "unset"]
    lines = [f"float32, {cores} cores, wall time, {ROUNDS} rounds", "threads   OMP_WAIT_POLICY   step, ms   speed"]
    for (threads, policy), taken in times.items():
        ratios = sorted(other / one for other, one in zip(usual, taken, strict=True))
        speed = f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"{threads:>7}   {policy:<15}   {1000 * statistics.median(taken):8.0f}   {speed}")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".txt").write_text(text)
    print(text, end="")


def measured(threads: int, policy: str) -> float:
    """The seconds of a step in a process with this setting."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy != "unset":
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, __file__, str(threads)]
    return float(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


def measure(threads: int) -> None:
    """Prints the seconds of a step with this number of threads."""
    import torch
    from float32_gains import small_network_and_batch

    torch.set_num_threads(threads)
    network, images, timesteps = small_network_and_batch()
    taken = []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        network(images, timesteps).sample.square().mean().backward()
        taken.append(time.perf_counter() - start)
    print(statistics.median(taken[2:]))


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
