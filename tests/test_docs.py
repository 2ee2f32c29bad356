"""The documentation: its code runs, its images exist, its tables agree with the package, Sphinx has no complaints."""

import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
from operator import attrgetter
from statistics import mean

import pytest
import torch
from diffusers import AutoencoderTiny
from docs_code import PAGES, ROOT, borrowed_names, python_blocks

import reg_diffusers
from reg_diffusers import RegularizedLoss, Term, X0Regularization, load_regularizer, regularizers
from reg_diffusers.regularizers import mean_intensity
from reg_diffusers.settings.arguments import build_parser

pytestmark = pytest.mark.project


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    namespace = {"__name__": f"docs_{page.stem}"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, code in python_blocks(page):
            exec(compile("\n" * line + code, page, "exec"), namespace)
    for name in set(sys.modules) - modules:  # what the page wrote and imported
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


SESSION = "*The Python code on this page is one session: each block continues those above it.*"


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_a_block_runs_by_itself_or_the_page_says_that_it_continues(page):
    borrowed = [borrowed_names(code) for _, code in python_blocks(page)]
    assert borrowed[0] == set()
    before, mark, _ = page.read_text(encoding="utf-8").partition(SESSION)
    assert bool(mark) == any(borrowed), f"{page.name}: {SESSION}"
    assert "```python" not in (before if mark else ""), "the sentence belongs above the first block"


def test_each_public_name_has_a_page_of_its_own():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = re.findall(r"\.\. automodule:: (\S+)\n((?:(?!\.\. automodule).*\n)*)", page)
    listed = {module: set(re.findall(r"^   (\w+)$", text, re.MULTILINE)) for module, text in modules}
    names = {name for found in listed.values() for name in found}
    public = {name for name in reg_diffusers.__all__ if not inspect.ismodule(getattr(reg_diffusers, name))}
    assert public - names == set() and {*regularizers.__all__} - {"physics"} - names == set()
    for module, found in listed.items():
        assert [name for name in found if not hasattr(importlib.import_module(module), name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_images_exist(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|```\{(?:image|figure)\} (\S+)|<img[^>]+src=\"([^\"]+)", text)
    local = [path for match in found for path in match if path and "://" not in path]
    assert [path for path in local if not (page.parent / path).is_file()] == []


def test_every_image_is_shown_and_small():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    images = sorted((ROOT / "docs" / "images").rglob("*.png"))
    assert images
    assert [image.name for image in images if image.name not in text] == []
    assert [image.name for image in images if image.stat().st_size > 150_000] == []


def test_the_four_corners_are_as_measured():
    page = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "benchmarks" / "four_corners.json").read_text())
    rows = {name: [run[name] for run in measured["runs"]] for name in ("data", "plain", "trained")}
    for method in ("mpgd", "dps", "lgd"):
        for name, key in (("guided", "as low as trained"), ("trained and guided", "trained, same scale")):
            of_method = [run[key][method] for run in measured["runs"]]
            scale = mean(row["scale"] for row in of_method)
            rows[f"{name}, `{method}`, scale {scale:.2g}"] = of_method
    for name, of_name in rows.items():
        loss, distance = (mean(row[key] for row in of_name) for key in ("loss", "distance"))
        assert f"| {name} | {loss:.3f} | {distance:.3f} |" in page


def test_the_memory_for_decoding_is_as_computed():
    """Recomputed for the small autoencoder; the large one only has to agree with the table."""
    script = runpy.run_path(str(ROOT / "docs" / "benchmarks" / "decoding_memory.py"))
    rows = json.loads(script["RESULT"].with_suffix(".json").read_text())
    table = script["RESULT"].with_suffix(".txt").read_text()
    assert script["_table"](rows).splitlines()[2:] == table.splitlines()[2:]
    with torch.device("meta"):
        small = AutoencoderTiny()
    small_rows = [row for row in rows if row["autoencoder"] == "AutoencoderTiny"]
    assert len(small_rows) == 8
    for row in small_rows:
        for name, value in script["_measure"](small, row["dtype"], row["setting"]).items():
            assert row[name] == pytest.approx(value, rel=0.02, abs=0.001), (row, name)


def test_no_damage_was_missed():
    text = (ROOT / "docs" / "benchmarks" / "damaged_files.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0].split() == ["tries", "noticed", "read", "missed"]
    rows = re.findall(r"^(.+?) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    assert len(rows) == 12
    for name, *numbers in rows:
        tries, noticed, read, missed = map(int, numbers)
        assert tries >= 100 and tries == noticed + read and missed == 0, name
    assert {name: int(tries) for name, tries, *_ in rows}["manifest.json, one bit flipped"] >= 400


def test_every_regularizer_is_in_the_table():
    table = (ROOT / "docs" / "regularizers.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)` \| \$", table, re.MULTILINE))
    assert {*regularizers.__all__, *(f"physics.{name}" for name in regularizers.physics.__all__)} <= rows
    for name in rows:
        attrgetter(name)(regularizers)


def test_the_gallery_is_as_measured():
    """The weight of each command and the numbers below each picture are those of the benchmark."""
    page = (ROOT / "docs" / "regularizers.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "benchmarks" / "gallery.json").read_text())
    assert {*regularizers.physics.__all__, "perceptual", "self_perceptual", "score"} < {*measured}
    for name, row in measured.items():
        entry = " ".join(page.split(f"### `{name}`\n")[1].split("\n#")[0].split())
        assert f"(images/gallery/{name}.png)" in entry
        assert f"--reg_weight {row['weight']:g} " in entry or "--reg_weight" not in entry, name
        assert f"gate `{row['gate'].replace('min_snr=', '')}`" in entry, name
        assert f"Diagnosis: *{row['verdict']}*;" in entry, name
        plain, trained, data = (row[title] for title in ("plain", "with", "data"))
        for key, title, digits in (
            ("loss", "$L'$", ".2g"),
            ("distance", "distance", ".3f"),
            ("standard_deviation", "standard deviation", ".2f"),
        ):
            if key in plain:
                numbers = f"{plain[key]:{digits}} → {trained[key]:{digits}} ("
                assert f"{title} {numbers}" in entry and f"{data[key]:{digits}})" in entry, (name, key)


def forgot_the_image(x0_hat, /):
    return x0_hat.mean()


def detached(x0_hat, /):
    return x0_hat.detach().flatten(1).mean(1)


def root_of_negative(x0_hat, /):
    return (-1 - x0_hat**2).sqrt().flatten(1).mean(1)


def with_mask(x0_hat, /, *, mask):
    return (x0_hat * mask).flatten(1).mean(1)


with_mask.needs = ("mask",)


def evaluate(scheduler, regularizer, steps=1, **term):
    output, sample = torch.zeros(2, 1, 4, 4, requires_grad=True), torch.ones(2, 1, 4, 4)
    loss_fn = X0Regularization(scheduler, [Term(regularizer, weight=1.0, **term)])
    for _ in range(steps):
        loss_fn(output, torch.tensor([5, 50]), sample)


MISTAKES = {
    "must return one value per image": lambda scheduler: evaluate(scheduler, forgot_the_image),
    "is detached from x0_hat: no gradient can reach the": lambda scheduler: evaluate(scheduler, detached),
    "needs mask, but the loss was given nothing": lambda scheduler: evaluate(scheduler, with_mask),
    "was not finite for 10 steps in a row": lambda scheduler: evaluate(scheduler, root_of_negative, steps=10),
    "the weighting of 'mean_intensity' must return one value per image": lambda scheduler: evaluate(
        scheduler, mean_intensity, weighting=lambda level: 0.5
    ),
    "the weighting of 'mean_intensity' is not finite": lambda scheduler: evaluate(
        scheduler, mean_intensity, weighting=lambda level: level.snr / 0
    ),
    "cannot be called; load_regularizer turns a name into a regularizer": lambda scheduler: Term("symmetry", 1.0),
    "terms need different names": lambda scheduler: RegularizedLoss(scheduler, [Term(mean_intensity, 1.0)] * 2),
    "weight must be finite and at least 0": lambda scheduler: Term(mean_intensity, weight=-1.0),
    "unknown regularizer": lambda scheduler: load_regularizer("no_such_regularizer"),
    "no module": lambda scheduler: load_regularizer("no_such_module:attribute"),
    "has no": lambda scheduler: load_regularizer("math:no_such_function"),
    "needs in_features, out_features": lambda scheduler: load_regularizer("torch.nn:Linear"),
    "which cannot be called": lambda scheduler: load_regularizer("math:pi"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_error_messages_are_those_of_the_table(message):
    from diffusers import DDPMScheduler

    table = (ROOT / "docs" / "own_regularizer.md").read_text(encoding="utf-8")
    assert f"`{message}" in table
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=re.escape(message)):
        MISTAKES[message](DDPMScheduler())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["mathematics", "regularizers", "four_corners", "buckets"])
def test_figures_can_be_made(script, tmp_path, monkeypatch):
    folder = ROOT / "docs" / "figures"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "shared", raising=False)
    import shared

    monkeypatch.setattr(shared, "IMAGES", tmp_path)
    runpy.run_path(str(folder / f"{script}.py"), run_name="__main__")
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made and made <= {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    del sys.modules["shared"]


@pytest.mark.slow
def test_strict_build(tmp_path):
    for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(name)
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "mathematics.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""<(?:script|link)[^>]+(?:src|href)=["']([^"']+)""", page)
    assert [path for path in loaded if "://" in path] == []  # formulas and buttons need no other server
    assert any("mathjax/tex-svg.js" in path for path in loaded) and any("copybutton.js" in path for path in loaded)
    for path in loaded:
        assert (tmp_path / path.split("?")[0]).exists() or path.endswith(".html") or path.startswith("#"), path
    flags = (tmp_path / "flags.html").read_text(encoding="utf-8")
    for action in build_parser()._actions:
        for name in action.option_strings:
            assert action.dest == "help" or f'id="cmdoption-train-{name.lstrip("-")}"' in flags, name
    assert "A run writes its own, reg_settings.yaml" in flags
    term = (tmp_path / "generated" / "reg_diffusers.term.score.html").read_text(encoding="utf-8")
    assert 'href="https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor"' in term  # of the signature
