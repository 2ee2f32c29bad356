"""Settings of the optimization: steps, batches, AdamW, and the averaging of weights."""

from __future__ import annotations

from dataclasses import dataclass

from .flag_values import fraction, natural, nonnegative, positive, positive_int, seed
from .flags import flag

__all__ = ["OptimizationSettings"]


@dataclass(frozen=True)
class OptimizationSettings:
    """How to minimize the loss; equal settings give equal weights on one machine."""

    seed: int = flag(0, "seed of weights, data order and noise", parse=seed)
    train_batch_size: int = flag(16, "images per process and step", parse=positive_int)
    num_epochs: int = flag(100, "passes over the data", parse=positive_int)
    max_train_steps: int | None = flag(None, "optimizer steps; overrides --num_epochs", parse=positive_int)
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", parse=positive_int)
    learning_rate: float | None = flag(
        None,
        "learning rate of AdamW after the warmup (default: 1e-3 for a new network of the default architecture up to 64"
        " pixels, else 1e-4)",
        parse=positive,
    )
    lr_scheduler: str = flag(
        "cosine",
        "schedule of the learning rate",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    )
    lr_warmup_steps: int = flag(100, "steps in which the learning rate rises", parse=natural)
    adam_beta1: float = flag(0.95, "decay rate of AdamW's first moment", parse=fraction)
    adam_beta2: float = flag(0.999, "decay rate of AdamW's second moment", parse=fraction)
    adam_weight_decay: float = flag(1e-6, "weight decay of AdamW", parse=nonnegative)
    adam_epsilon: float = flag(1e-8, "epsilon in the denominator of AdamW", parse=positive)
    use_8bit_adam: bool = flag(
        False,
        "AdamW with moments of 8 bits, which saves 6 bytes of memory per weight; tensors of fewer than 4,096 numbers"
        " keep 32 bits. Needs pip install bitsandbytes",
    )
    max_bad_steps: int = flag(
        10,
        "stop after N consecutive steps with a non-finite loss or gradient (such a step is skipped) or with a"
        " non-finite L' of an image (such an image is dropped)",
        parse=positive_int,
        metavar="N",
        mathematics=False,
    )
    max_grad_norm: float = flag(1.0, "norm to clip gradients to", parse=positive)
    use_ema: bool = flag(True, "sample from and save an exponential moving average of the weights", switch=True)
    ema_inv_gamma: float = flag(1.0, "inverse gamma of the warmup of the average", parse=positive)
    ema_power: float = flag(0.75, "power of the warmup of the average", parse=positive)
    ema_max_decay: float = flag(0.9999, "largest decay rate of the average", parse=fraction)
