"""Train diffusion models with an extra loss on the denoised image.

    L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat)

Names are imported on first use, so `import reg_diffusers` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import moved

if TYPE_CHECKING:  # for editors and type checkers, which do not follow __getattr__
    from .affine_schedule import AffineSchedule as AffineSchedule
    from .balancing import BalancedLoss as BalancedLoss
    from .balancing import balance as balance
    from .conditioning import takes_condition as takes_condition
    from .conditioning import with_condition as with_condition
    from .context import Shared as Shared
    from .diagnosis import diagnose as diagnose
    from .diagnosis import judge as judge
    from .estimators import Ddim as Ddim
    from .estimators import KnownNoise as KnownNoise
    from .estimators import MonteCarlo as MonteCarlo
    from .estimators import Prediction as Prediction
    from .estimators import one_step as one_step
    from .guidance import Guidance as Guidance
    from .loss_output import LossOutput as LossOutput
    from .networks.dit import RegDiTPipeline as RegDiTPipeline
    from .networks.text_to_image import RegTextToImagePipeline as RegTextToImagePipeline
    from .objective import RegularizedLoss as RegularizedLoss
    from .objective import draw_timesteps as draw_timesteps
    from .paired import Paired as Paired
    from .pipeline import RegDDPMPipeline as RegDDPMPipeline
    from .prediction import NoiseLevel as NoiseLevel
    from .prediction import add_noise as add_noise
    from .prediction import model_output_for as model_output_for
    from .prediction import noise_level as noise_level
    from .prediction import predict_original_sample as predict_original_sample
    from .prediction import prediction_target as prediction_target
    from .prediction import scale_model_input as scale_model_input
    from .regularization import X0Regularization as X0Regularization
    from .regularizers import Regularizer as Regularizer
    from .specs import load_estimator as load_estimator
    from .specs import load_regularizer as load_regularizer
    from .specs import load_schedule as load_schedule
    from .specs import load_weighting as load_weighting
    from .term import Term as Term
    from .term import TermError as TermError
    from .term import needs_of as needs_of
    from .weight_rules import AutoWeight as AutoWeight
    from .weight_rules import Target as Target
    from .weight_schedules import every as every
    from .weight_schedules import linear_decay as linear_decay
    from .weight_schedules import warmup as warmup

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
    "RegDiTPipeline": "networks.dit",
    "RegTextToImagePipeline": "networks.text_to_image",
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
