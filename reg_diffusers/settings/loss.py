"""Settings of the loss: the auxiliary losses on x0_hat, their weights, and the weight of the denoising loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from ..weight_rules import AutoWeight
from .flag_values import positive, target, weight
from .flags import flag
from .weights import NamedTarget

__all__ = ["LossSettings"]


@dataclass(frozen=True)
class LossSettings:
    """L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat).

    After construction, `regularizer`, `reg_weight`, `reg_weighting`, `reg_estimator` and `reg_schedule` have one entry
    per term; ("none",) becomes ().

    Raises:
        UsageError: if the entries do not match.
    """

    regularizer: tuple[str, ...] = flag(
        ("total_variation",),
        "losses L' on x0_hat: built-in names, or my_module:MyReg from the current folder, with optional literal"
        " arguments, such as 'mean_intensity(target=0.2)'; 'none' trains a plain model",
        metavar="NAME",
        many=True,
    )
    reg_weight: tuple[float | AutoWeight, ...] = flag(
        (0.1,),
        "one weight per regularizer, or one for all; auto:0.1 finds the weight at which the gradient of L' at the"
        " output of the network is a tenth of that of the denoising loss, and freezes it 100 steps after"
        " --lr_warmup_steps",
        parse=weight,
        metavar="WEIGHT",
        many=True,
    )
    reg_target: tuple[NamedTarget, ...] | None = flag(
        None,
        "minimize the denoising loss while the mean of L' of x0_hat is at most VALUE, or at most a multiple of that of"
        " the data, such as total_variation=0.9x; replaces the --reg_weight of that regularizer",
        parse=target,
        metavar="NAME=VALUE",
        many=True,
    )
    reg_weighting: tuple[str, ...] = flag(
        ("matched",),
        "weight of each regularizer by noise level: matched, constant (exactly the formula), snr, alpha_bar,"
        " truncated_snr, low_noise, 'gated(3)' (1 from this SNR on, else 0), or my_module:my_weighting; one per"
        " regularizer, or one for all",
        metavar="NAME",
        many=True,
    )
    reg_estimator: tuple[str, ...] | None = flag(
        None,
        "the x0_hat that each regularizer sees: one_step (default), 'ddim(1)' (1 more network call per active image),"
        " 'known_noise(0.5)' (half way to the true image), 'monte_carlo(4)' (the mean of L' over 4 draws around it),"
        " or my_module:my_estimator; one per regularizer, or one for all",
        metavar="NAME",
        many=True,
    )
    reg_schedule: tuple[str, ...] | None = flag(
        None,
        "factor of each weight by the number of optimizer steps so far: constant (default), 'warmup(500)' (from 0 to 1"
        " in 500 steps), 'linear_decay(1000, 5000)' (1 until step 1000, 0 from step 5000 on), 'every(4)' (in every"
        " fourth step only; the loss costs nothing in the others), a product such as 'warmup(500) * every(4)', or"
        " my_module:my_schedule; one per regularizer, or one for all",
        metavar="NAME",
        many=True,
    )
    reg_units: str = flag(
        "user",
        "units of fields in L' and its weight: those of the file (user), or those of the network, about -1 to 1"
        " (model). L' sees images from -1 to 1 in either case",
        choices=["user", "model"],
    )
    reg_balance: str | None = flag(
        None,
        "combine the gradients of all losses, before clipping and AdamW, into one that conflicts with none of them to"
        " first order: by ConFIG (arXiv:2408.11104; weights then only affect the length of an update) or PCGrad"
        " (arXiv:2001.06782; pairwise). Needs one backward pass and memory for the gradients per loss, and pip install"
        " conflictfree",
        choices=["config", "pcgrad"],
    )
    snr_gamma: float | None = flag(
        None, "min-SNR weighting of the denoising loss, 5 is usual (arXiv:2303.09556)", parse=positive
    )
    loss_weighting: str = flag(
        "none",
        "factor of the denoising loss by noise level: none, sigma_sqrt and cosmap as in diffusers' SD3 scripts, or v,"
        " the loss of the velocity for any prediction. matched follows it; excludes --snr_gamma",
        choices=["none", "sigma_sqrt", "cosmap", "v"],
    )
    timestep_sampling: str = flag(
        "uniform",
        "density of the timesteps: uniform, or more at medium noise, by a logit-normal distribution or by the mode"
        " density of SD3 (arXiv:2403.03206)",
        choices=["uniform", "logit_normal", "mode"],
    )
    compare: bool = flag(
        False,
        "train a second, plain model on the same batches and noise, and compare the two; doubles the work. On by"
        " default for the embedded data only",
        switch=True,
        mathematics=False,
    )

    def __post_init__(self):
        if self.snr_gamma is not None and self.loss_weighting != "none":
            raise UsageError("--snr_gamma and --loss_weighting both weight the denoising loss: pass only one")
        if self.regularizer == ("none",):
            for name in ("reg_target", "reg_estimator", "reg_schedule"):
                if given := getattr(self, name):
                    raise UsageError(f"--{name} {given[0]} needs a regularizer, but none is given")
            nothing = {"regularizer": (), "reg_weight": (), "reg_weighting": (), "reg_estimator": None}
            self._set(**nothing, reg_schedule=None, compare=False)
        if "none" in self.regularizer:
            raise UsageError("--regularizer none cannot be combined with other regularizers")
        for name in ("reg_weight", "reg_weighting", "reg_estimator", "reg_schedule"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) == 1:
                self._set(**{name: tuple(values) * len(self.regularizer)})
            elif len(values) != len(self.regularizer):
                raise UsageError(
                    f"--{name} has {len(values)} entries for {len(self.regularizer)} regularizers"
                    f" ({' '.join(self.regularizer) or 'none'}): pass one for each, or one for all"
                )

    @property
    def estimators(self) -> tuple[str, ...]:
        """The estimator of each term."""
        return self.reg_estimator or ("one_step",) * len(self.regularizer)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedule of the weight of each term."""
        return self.reg_schedule or ("constant",) * len(self.regularizer)

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
