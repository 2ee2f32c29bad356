"""The part of a model card about the objective: the formula of the loss, its definitions, and a table of the terms."""

from __future__ import annotations

import re

from ..runs.measurement import as_code

__all__ = ["block", "objective_section"]

_FORMULAS = {  # by prediction type: target of the network, its definition, the image that the output implies
    "epsilon": ("eps", None, "(x_t - sigma(t) * model(x_t, t)) / alpha(t)"),
    "sample": ("x_0", None, "model(x_t, t)"),
    "v_prediction": ("v", "alpha(t) * eps - sigma(t) * x_0", "alpha(t) * x_t - sigma(t) * model(x_t, t)"),
    "flow_prediction": ("(eps - x_0)", None, "x_t - sigma(t) * model(x_t, t)"),
}
_WEIGHTINGS = {
    "constant": "1",
    "snr": "SNR(t) = alpha(t)^2 / sigma(t)^2",
    "matched": "min(w(t), 100) / (1 + (10 / SNR(t))^2), 0 at high noise; the first term is w(t) * ||x_0 - x0_hat||^2",
    "alpha_bar": "alpha(t)^2 / (alpha(t)^2 + sigma(t)^2)",
    "truncated_snr": "max(SNR(t), 1)",
    "low_noise": "1 for t < 200, else 0",
}
_LOSS_WEIGHTINGS = {
    "sigma_sqrt": "1 / s^2, s = sigma(t) / (alpha(t) + sigma(t))",
    "cosmap": "2 / (pi (1 - 2 s + 2 s^2)), s = sigma(t) / (alpha(t) + sigma(t))",
    "v": "the factor that makes this the squared error of the velocity, sigma(t) at least 0.05",
}
_SEEN = {  # by units: what a loss sees of x0_hat
    "user": "; a loss sees it in the fields' own units",
    "decoded": ", a latent; a loss sees it decoded to an image",
}
_ESTIMATORS = {
    "ddim": "the end of a deterministic trajectory from x_t, with further calls of the network",
    "known_noise": "a blend of x_0 and x0_hat",
    "monte_carlo": "draws around x0_hat, over which the loss is averaged",
}


def objective_section(objective: dict | None) -> str:
    """Builds the section with the formula; empty without an objective."""
    if not objective:
        return ""
    output, meaning, implied = _FORMULAS[objective["prediction_type"]]
    terms, gamma = objective["terms"], objective.get("snr_gamma")
    plain = f"min(SNR(t), {gamma:g}) * ||x_0 - x0_hat||^2" if gamma else f"||{output} - model(x_t, t)||^2"
    plain = f"w(t) * {plain}" if "loss_weighting" in objective else plain
    extra = [f" + {_scale_of(term)} * {_function(term['weighting'])}(t) * {_loss_of(term)}" for term in terms]
    definitions = {"x_t": "alpha(t) * x_0 + sigma(t) * eps, a training sample x_0 with noise eps"}
    if "loss_weighting" in objective:
        definitions["w(t)"] = _LOSS_WEIGHTINGS[objective["loss_weighting"]]
    if "timestep_sampling" in objective:
        definitions["t"] = f"drawn by the {objective['timestep_sampling']} density of arXiv:2403.03206"
    if meaning and not gamma:
        definitions[output] = meaning
    if terms or gamma:
        seen = _SEEN.get(objective.get("units"), "") if terms else ""
        definitions["x0_hat"] = f"{implied}, the sample that the output of the network implies{seen}"
    if gamma:
        definitions["SNR(t)"] = "alpha(t)^2 / sigma(t)^2"
    for weighting in dict.fromkeys(term["weighting"] for term in terms):
        definitions[f"{_function(weighting)}(t)"] = _WEIGHTINGS.get(weighting, f"{weighting}, defined by the author")
    for estimator in dict.fromkeys(term["estimator"] for term in terms if "estimator" in term):
        own = f"{estimator}, an estimate of the image defined by the author"
        definitions[estimator] = _ESTIMATORS.get(estimator.partition("(")[0].strip(), own)
    if any("schedule" in term for term in terms):
        definitions["factor(step)"] = "the schedule of the weight over the steps of the training, in the table"
    width = max(map(len, definitions))
    lines = [f"L = {plain}{''.join(extra)}", "", *(f"{name:<{width}} = {text}" for name, text in definitions.items())]
    sections = ["## Objective", block("text", *lines)]
    if terms:
        sections += [_terms_table(terms), _note_on_own_code(terms)]
    return "\n\n".join(section for section in sections if section)


def _scale_of(term: dict) -> str:
    return f"{'factor(step) * ' if 'schedule' in term else ''}{term['weight']:g}"


def _loss_of(term: dict) -> str:
    return f"{term['name']}({term.get('estimator', 'x0_hat')})"


def _function(spec: str) -> str:
    """Returns the last name of `module:attribute`, with the module if a built-in weighting has the same name."""
    name = spec.replace(".", ":").split(":")[-1]
    return spec.replace(":", ".") if ":" in spec and name in _WEIGHTINGS else name


def _terms_table(terms: list[dict]) -> str:
    rows = [
        f"| {as_code(term['name'])} | {as_code(term['regularizer'])} | {_weight(term)} | {as_code(term['weighting'])}"
        f" | {term['gate']} |"
        for term in terms
    ]
    return "\n".join(["| loss | specified as | weight | weighting | active at |", "|---|---|---|---|---|", *rows])


def _weight(term: dict) -> str:
    """Returns the weight, the rule that set it and its schedule."""
    rule = f" (by {term['weight_rule']})" if "weight_rule" in term else ""
    schedule = f", times {as_code(term['schedule'])}" if "schedule" in term else ""
    return f"{term['weight']:g}{rule}{schedule}"


def _note_on_own_code(terms: list[dict]) -> str:
    given = [spec for term in terms for spec in (term["regularizer"], term["weighting"], term.get("estimator", ""))]
    given += [factor.strip() for term in terms for factor in term.get("schedule", "").split("*")]
    modules = dict.fromkeys(spec.split(":")[0] for spec in given if ":" in spec)
    if not modules:
        return ""
    named = " and ".join(map(as_code, modules))
    return f"{named} {'is' if len(modules) == 1 else 'are'} code of the author that is not in this repository."


def block(language: str, *lines: str) -> str:
    """Builds a fenced block of code."""
    longest = max((len(run) for line in lines for run in re.findall("`{3,}", line)), default=2)
    fence = "`" * (longest + 1)  # longer than any fence inside the block
    return "\n".join([f"{fence}{language}", *lines, fence])
