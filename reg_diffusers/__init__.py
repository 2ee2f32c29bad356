"""Train diffusion models with an extra loss on the denoised image.

    L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat)

Names are imported on first use, so `import reg_diffusers` is fast.
"""

from importlib import import_module

from . import moved

__version__ = "0.4.0.dev0"

_HOME = {
    "AffineSchedule": "affine_schedule",
    "AutoWeight": "weight_rules",
    "BalancedLoss": "balancing",
    "Ddim": "estimators",
    "Guidance": "guidance",
    "KnownNoise": "estimators",
    "LossOutput": "loss_output",
    "MonteCarlo": "estimators",
    "NoiseLevel": "prediction",
    "Paired": "paired",
    "Prediction": "estimators",
    "RegDDPMPipeline": "pipeline",
    "RegularizedLoss": "objective",
    "Regularizer": "regularizers",
    "Shared": "context",
    "Target": "weight_rules",
    "Term": "term",
    "TermError": "term",
    "X0Regularization": "regularization",
    "add_noise": "prediction",
    "diagnose": "diagnosis",
    "balance": "balancing",
    "draw_timesteps": "objective",
    "every": "weight_schedules",
    "linear_decay": "weight_schedules",
    "judge": "diagnosis",
    "load_estimator": "specs",
    "load_regularizer": "specs",
    "load_schedule": "specs",
    "load_weighting": "specs",
    "model_output_for": "prediction",
    "needs_of": "term",
    "noise_level": "prediction",
    "one_step": "estimators",
    "predict_original_sample": "prediction",
    "prediction_target": "prediction",
    "scale_model_input": "prediction",
    "takes_condition": "conditioning",
    "warmup": "weight_schedules",
    "with_condition": "conditioning",
}
_SUBMODULES = (
    "balancing",
    "conditioning",
    "conflict_free",
    "context",
    "estimators",
    "diagnosis",
    "evaluation",
    "guidance",
    "objective",
    "pipeline",
    "prediction",
    "recipes",
    "regularization",
    "regularizers",
    "specs",
    "standalone",
    "term",
    "views",
    "weight_schedules",
    "weighting",
)

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


moved.watch()
