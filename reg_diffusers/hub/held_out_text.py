"""The part of a model card about held-out images."""

from __future__ import annotations

from ..runs.measurement import as_code, as_text

__all__ = ["held_out_text"]


def held_out_text(validation: dict) -> str:
    """Builds a paragraph on the losses of held-out images; empty without them.

    Args:
        validation: the content of validation.json.
    """
    if not validation:
        return ""
    last, best = validation["last"], validation["best"]
    images, held_out = validation["images"], validation["held_out"]
    of_all = "" if images == held_out else f" of {held_out:,}"
    terms = {name.removeprefix("validation/raw/"): value for name, value in last.items() if "/raw/" in name}
    losses = "".join(f", and L' of {as_text(name)} is {value:.4g}" for name, value in terms.items())
    kept = (
        "; that model is in the folder `best` of the run, which is not uploaded" if validation["best_is_kept"] else ""
    )
    lowest = f" The lowest was {best['validation/denoising']:.5g}, at step {best['step']:,}{kept}." if best else ""
    return (
        f"On {images:,}{of_all} images held out from the training ({as_code(validation['source'])}), the denoising"
        f" loss at step {last['step']:,} is {last['validation/denoising']:.5g}{losses}: with the"
        f" {validation['weights']} weights, and with the same noise at each measurement.{lowest}"
    )
