"""Train diffusion models with an extra loss on the denoised image.

    L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat)

Names are imported on first use, so that `import reg_diffusers` costs next to nothing.
"""

from importlib import import_module

__version__ = "0.3.0"

_HOME = {
    "BalancedLoss": "balancing",
    "Guidance": "guidance",
    "LossOutput": "objective",
    "NoiseLevel": "prediction",
    "RegDDPMPipeline": "pipeline",
    "RegularizedLoss": "objective",
    "Regularizer": "regularizers",
    "Term": "term",
    "TermError": "term",
    "X0Regularization": "objective",
    "add_noise": "prediction",
    "diagnose": "evaluation",
    "balance": "balancing",
    "draw_timesteps": "objective",
    "judge": "evaluation",
    "load_regularizer": "specs",
    "load_weighting": "specs",
    "model_output_for": "prediction",
    "noise_level": "prediction",
    "predict_original_sample": "prediction",
    "prediction_target": "prediction",
    "scale_model_input": "prediction",
    "with_condition": "conditioning",
}
_SUBMODULES = (
    "balancing",
    "conditioning",
    "evaluation",
    "guidance",
    "objective",
    "pipeline",
    "prediction",
    "regularizers",
    "specs",
    "standalone",
    "term",
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
