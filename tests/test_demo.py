"""The demo: what it shows is what the pipeline gives, in Python and in a real browser."""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace
from xml.etree import ElementTree

import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from tiny_pipelines import autoencoder, save_stable_diffusion

from reg_diffusers import RegDDPMPipeline, RegTextToImagePipeline
from reg_diffusers.cli import demo as command
from reg_diffusers.cli import main
from reg_diffusers.demo import build_demo
from reg_diffusers.demo.sampling import DemoSettings, Run, watch
from reg_diffusers.demo.view import show
from reg_diffusers.pipeline import fast_scheduler
from reg_diffusers.regularizers import symmetry, total_variation
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.sampling.schedulers import fitting_samplers

pytestmark = pytest.mark.sampling


def make_pipeline(unet, **config):
    return RegDDPMPipeline(unet.eval(), DDPMScheduler(prediction_type="v_prediction", **config))


def sampled(pipeline, scale, seed=0, steps=20, number=4, regularizer=total_variation, method="mpgd", label=None):
    """L' of samples of the pipeline as anyone would draw them: the mean, which the demo has to show."""
    drawing = RegDDPMPipeline(pipeline.unet, fast_scheduler(pipeline.scheduler))
    drawing.set_progress_bar_config(disable=True)
    output = drawing(
        batch_size=number,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        regularizers={"score": regularizer},
        class_labels=label,
        guidance=[regularizer],
        regularizer_scale=scale,
        guidance_method=method,
    )
    return output.scores["score"].mean().item()


def sampled_in_latents(pipeline, text, scale, label=None, number=1, steps=20):
    """L' of images of a text-to-image pipeline, or of classes in latents."""
    drawing = pipeline.with_parts(scheduler=fast_scheduler(pipeline.scheduler))
    drawing.set_progress_bar_config(disable=True)
    given = {"class_labels": label} if text is None else {"prompt": text}
    generator, guidance = torch.Generator().manual_seed(0), [total_variation]
    call = {"regularizers": guidance, "guidance": guidance, "regularizer_scale": scale}
    output = drawing(number, generator, num_inference_steps=steps, **given, **call)
    return output.scores["total_variation"].mean().item()


def settings_for(pipeline, regularizer=total_variation, **settings):
    return DemoSettings(fitting_samplers(pipeline)["DDIM"], regularizer, **settings)


# Two runs


@pytest.mark.parametrize("method", ["mpgd", "dps", "lgd"])
def test_scores_are_those_of_the_pipeline(tiny_unet, method):
    pipeline = make_pipeline(tiny_unet(num_class_embeds=3))
    settings = settings_for(
        pipeline, seed=3, steps=6, number=2, class_label=1, guidance_method=method, regularizer_scale=0.2
    )
    *_, (plain, guided) = watch(pipeline, settings)
    same = {"seed": 3, "steps": 6, "number": 2, "label": 1, "method": method}
    assert plain.score == pytest.approx(sampled(pipeline, 0.0, **same), rel=1e-5)
    assert guided.score == pytest.approx(sampled(pipeline, 0.2, **same), rel=1e-5)
    assert guided.score < plain.score
    assert plain.images.shape == guided.images.shape == (2, 1, 8, 8)
    assert len(plain.values) == len(guided.values) == 6


def test_a_run_is_seen_while_it_samples_and_ends_when_nobody_looks(tiny_unet):
    pipeline = make_pipeline(tiny_unet())
    with closing(watch(pipeline, settings_for(pipeline, steps=900), interval=0.02)) as looks:
        for plain, guided in looks:
            if plain.values and guided.values:
                break
        assert plain.score is None and plain.images.shape == (4, 1, 8, 8)
    assert 0 < len(plain.values) < 900 and 0 < len(guided.values) < 900


def test_an_error_in_a_run_is_raised(tiny_unet):
    def broken(x0_hat, /):
        raise TypeError("broken")

    pipeline = make_pipeline(tiny_unet())
    with pytest.raises(TypeError, match="broken"):
        list(watch(pipeline, settings_for(pipeline, broken)))


def test_samplers_fit_the_model(tiny_unet):
    unet = tiny_unet()

    def names(scheduler, unet=unet):
        pipeline = RegDDPMPipeline(unet, scheduler)
        samplers = fitting_samplers(pipeline)
        for make in samplers.values():
            *_, (plain, _) = watch(pipeline, DemoSettings(make, total_variation, steps=3, number=1))
            assert plain.score > 0
            assert make() is not make()
        return list(samplers)

    diffusion = ["DDIM", "DDPM", "Euler", "DPM-Solver++", "UniPC"]
    assert names(DDPMScheduler()) == diffusion
    assert names(DDPMScheduler(prediction_type="sample")) == diffusion
    flow = ["Euler", "DPM-Solver++", "UniPC"]
    assert names(FlowMatchEulerDiscreteScheduler(shift=2.0)) == flow
    flow_solver = fitting_samplers(RegDDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=2.0)))["UniPC"]()
    assert names(flow_solver) == flow
    assert flow_solver.config.flow_shift == 2.0
    assert names(EDMEulerScheduler()) == ["EDMEuler"]
    learned = UNet2DModel.from_config(unet.config, out_channels=2)
    assert "DDPM" in names(DDPMScheduler(variance_type="learned_range"), learned)


@pytest.fixture
def text_model(tmp_path):
    save_stable_diffusion(tmp_path / "text", tmp_path / "scratch")
    return RegTextToImagePipeline.from_pretrained(tmp_path / "text")


def test_a_text_to_image_model_shows_decoded_images_of_its_text(text_model):
    make, found = fitting_samplers(text_model)["DDIM"], {}
    scheduler = text_model.scheduler
    for text in ("a cat", "a dog"):
        settings = DemoSettings(make, total_variation, steps=3, number=1, prompt=text, regularizer_scale=2.0)
        *_, (plain, guided) = watch(text_model, settings)
        for run, scale in ((plain, 0.0), (guided, 2.0)):
            assert run.score == pytest.approx(sampled_in_latents(text_model, text, scale, steps=3), rel=1e-4)
            assert run.images.shape == (1, 3, 16, 16) and len(run.values) == 3
        # x0_hat of the last step is the sample
        assert plain.values[-1] == pytest.approx(plain.score, rel=1e-3)
        found[text] = plain.score
    assert len(set(found.values())) == 2 and text_model.scheduler is scheduler


def test_a_model_in_latents_shows_decoded_images_of_its_class(tiny_unet):
    unet = tiny_unet(channels=4, num_class_embeds=3).eval()
    pipeline = RegDDPMPipeline(unet, DDPMScheduler(), vqvae=autoencoder(latent_channels=4))
    settings = settings_for(pipeline, steps=3, number=2, class_label=2, regularizer_scale=2.0)
    *_, (plain, guided) = watch(pipeline, settings)
    for run, scale in ((plain, 0.0), (guided, 2.0)):
        expected = sampled_in_latents(pipeline, None, scale, label=2, number=2, steps=3)
        assert run.score == pytest.approx(expected, rel=1e-4) and run.images.shape == (2, 3, 16, 16)


# What is shown


def finished(plain, guided, scale=0.1):
    runs = []
    for score in (plain, guided):
        run = Run(DemoSettings(None, total_variation, steps=3), scale)
        run.values, run.images, run.score = [0.1, float("nan"), 0.3], torch.zeros(2, 1, 8, 8), score
        runs.append(run)
    return runs


@pytest.mark.parametrize(
    ("scores", "scale", "said"),
    [
        ((0.5, 0.4), 0.1, "lowered L' by 20.0%"),
        ((0.5, 0.6), 0.1, "L' rose by 20.0%"),
        ((0.5, 0.5), 0.0, "no guidance"),
        ((0.0, 0.1), 0.1, "from 0 to 0.1"),
        ((float("nan"), 0.1), 0.1, "from nan to 0.1"),
        ((None, None), 0.1, "Step 3 of 3"),
    ],
)
def test_the_result_is_said_in_words(scores, scale, said):
    assert said in show("name", "", *finished(*scores, scale))


def test_the_result_is_well_formed_whatever_a_regularizer_is_called():
    html = show("<b>'\"&", "what it <does>", *finished(0.5, 0.4))
    root = ElementTree.fromstring(f"<div>{html.partition('</style>')[2].replace('/png;base64', '')}</div>")
    assert root.find(".//code").text == "<b>'\"&" and "what it <does>" in "".join(root.itertext())
    assert [path.get("d").count("L") for path in root.iter("path")] == [0, 2, 2]
    before_the_first_step = Run(DemoSettings(None, total_variation), 0.0)
    assert "Step 0 of 20" in show("name", "", before_the_first_step, before_the_first_step)


def test_the_data_are_the_reference():
    runs = finished(0.5, 0.4)
    assert "dotted" not in show("name", "", *runs) and "class='data'" not in show("name", "", *runs)
    html = show("name", "", *runs, 0.2)
    assert "Images of the data have 0.2; going below that is no improvement." in html and "dotted: data" in html
    root = ElementTree.fromstring(f"<div>{html.partition('</style>')[2].replace('/png;base64', '')}</div>")
    heights = {path.get("class"): path.get("d") for path in root.iter("path")}
    axis = [float(part.split()[1].partition("H")[0]) for part in heights["axis"].split("M")[1:]]  # of 0, 0.2, 0.4
    assert float(heights["data"].split()[1].partition("H")[0]) == axis[1]


def test_the_mean_over_the_data_is_that_of_their_images(tiny_unet, tmp_path, caplog):
    pipeline = make_pipeline(tiny_unet())
    for value in (0, 51, 255):
        PIL.Image.new("L", (8, 8), value).save(tmp_path / f"{value}.png")

    def mean(x0_hat, /):
        return x0_hat.flatten(1).mean(1)

    def broken(x0_hat, /):
        raise ValueError("not these")

    given = parse("--model", tmp_path, "--data", tmp_path)
    assert command._means_on_data(given, pipeline, {"mean": mean, "broken": broken}) == {
        "mean": pytest.approx((-1 - 0.6 + 1) / 3)
    }
    with caplog.at_level("INFO", "reg_diffusers"):
        assert command._means_on_data(parse("--model", tmp_path), pipeline, {"mean": mean}) == {}
    assert "no reference for L': " in caplog.text and "does not record its training data" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        command._means_on_data(parse("--model", tmp_path, "--data", tmp_path / "empty"), pipeline, {"mean": mean})


# The page, without a browser


@pytest.fixture
def demonstration(tiny_unet):
    pytest.importorskip("gradio")
    from reg_diffusers.demo.page import Demonstration

    def build(pipeline=None, **regularizers):
        return Demonstration(pipeline or make_pipeline(tiny_unet()), regularizers or {"tv": total_variation})

    return build


def draw(demonstration, visitor="me", **changed):
    values = {"regularizer": "tv", "method": "mpgd", "scale": 0.1, "seed": 0, "steps": 5, "scheduler": "DDIM"}
    values |= {"number": 2, "class_label": 0, "text": ""}
    return demonstration.draw(**values | changed, request=SimpleNamespace(session_hash=visitor))


def test_a_new_drawing_ends_the_old_one_of_the_same_visitor_only(demonstration):
    shared = demonstration()
    old, other = draw(shared, steps=200), draw(shared, visitor="somebody else", steps=200)
    next(old), next(other)
    *_, last = draw(shared, steps=5)
    assert "Done" in last
    assert list(old) == []
    assert "Done" in list(other)[-1]
    leaving = draw(shared, steps=200)
    next(leaving)
    shared.forget(SimpleNamespace(session_hash="me"))
    assert list(leaving) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": None}, "Noise seed must be a whole number from 0"),
        ({"seed": -1}, "Noise seed must be a whole number from 0"),
        ({"seed": 0.5}, "Noise seed must be a whole number from 0"),
        ({"steps": 0}, "Steps must be a whole number from 1 to 200"),
        ({"number": 17}, "Images must be a whole number from 1 to 16"),
        ({"scale": float("nan")}, "Regularizer scale must be a number from 0"),
        ({"scale": -0.1}, "Regularizer scale must be a number from 0"),
        ({"scale": ""}, "Regularizer scale must be a number from 0"),
        ({"regularizer": "shapeless"}, "must return one value per image"),
        ({"regularizer": "broken"}, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_work_is_said_on_the_page(demonstration, changed, message):
    import gradio as gr

    regularizers = {"tv": total_variation, "shapeless": lambda x: x.mean(), "broken": lambda x: 1 / 0}
    with pytest.raises(gr.Error) as caught:
        list(draw(demonstration(**regularizers), **changed))
    assert message in caught.value.message


def test_a_text_is_wanted_where_the_model_takes_one(demonstration, text_model):
    import gradio as gr

    shared = demonstration(text_model)
    assert "Done" in list(draw(shared, text="a cat", number=1, steps=2))[-1]
    for wrong in (None, 3, "a " * 501):
        with pytest.raises(gr.Error, match="Text must be a text of at most 1,000 characters"):
            list(draw(shared, text=wrong))


def test_a_class_label_is_wanted_where_the_model_has_classes(demonstration, tiny_unet):
    import gradio as gr

    conditional = demonstration(make_pipeline(tiny_unet(num_class_embeds=3)))
    assert "Done" in list(draw(conditional, class_label=2))[-1]
    with pytest.raises(gr.Error, match="Class label must be a whole number from 0 to 2"):
        list(draw(conditional, class_label=3))


def test_regularizers_and_models_that_cannot_be_shown_are_refused(tiny_unet):
    pytest.importorskip("gradio")

    def masked(x0_hat, /, *, mask):
        return (x0_hat * mask).flatten(1).mean(1)

    def of_its_class(x0_hat, /, *, class_labels):
        return x0_hat.flatten(1).mean(1) * class_labels

    masked.needs, of_its_class.needs = ("mask",), ("class_labels",)
    pipeline = make_pipeline(tiny_unet())
    with pytest.raises(ValueError, match="needs a regularizer"):
        build_demo(pipeline, {})
    with pytest.raises(ValueError, match="masked needs mask, which samples of this model lack"):
        build_demo(pipeline, {"masked": masked})
    with pytest.raises(ValueError, match="of_its_class needs class_labels"):
        build_demo(pipeline, {"of_its_class": of_its_class})
    conditional = make_pipeline(tiny_unet(num_class_embeds=3))
    build_demo(conditional, {"of_its_class": of_its_class})
    *_, (plain, _) = watch(conditional, settings_for(conditional, of_its_class, class_label=0))
    assert plain.score == 0 and set(plain.values) == {0.0}
    by_image = UNet2DModel.from_config(tiny_unet().config, in_channels=2)
    with pytest.raises(ValueError, match="conditioned on images"):
        build_demo(make_pipeline(by_image), {"tv": total_variation})


def test_without_gradio_the_extra_is_named(tiny_unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "reg_diffusers.demo.page", raising=False)
    with pytest.raises(ImportError, match=r'pip install "reg_diffusers\[demo\]"'):
        build_demo(make_pipeline(tiny_unet()), {"tv": total_variation})


def parse(*flags):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *map(str, flags)])


def test_what_cannot_work_is_said_by_the_command(tiny_unet, tmp_path):
    with pytest.raises(UsageError, match=r"--model \S+nothing: no such folder"):
        command.run(parse("--model", tmp_path / "nothing"))
    with pytest.raises(UsageError, match="--regularizer: unknown regularizer 'nothing'"):
        command.run(parse("--regularizer", "nothing"))
    pytest.importorskip("gradio")
    make_pipeline(tiny_unet()).save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: not free"):
            command.run(parse("--model", tmp_path, "--port", port))


# The page in a browser


@contextmanager
def served(folder, *flags):
    """The page that the real command serves, by its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; from reg_diffusers.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", code, "demo", "--model", str(folder), "--port", str(port), *flags]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert any(f"http://127.0.0.1:{port}" in line for line in server.stdout)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run window-size=1200,1400"
    flags += " disable-background-networking disable-component-update disable-sync"
    for flag in [*flags.split(), f"user-data-dir={tmp_path / 'browser'}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options, selenium.ChromeService(driver))
    yield opened
    opened.quit()


class Page:
    """The page as its visitor sees it."""

    def __init__(self, browser):
        self.browser = browser

    def wait(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.05)
        return found

    def text(self, selector):
        """What can be read of an element, "" as long as it is not there."""
        return self.browser.execute_script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        ).strip()

    def field(self, label):
        """The field where a number is typed."""
        slider, number = f"input[aria-label='number input for {label}']", f"input[aria-label='{label}']"
        found = self.browser.find_elements("css selector", f"{slider}, {number}")
        return next((field for field in found if field.is_displayed()), None)

    def type(self, label, value):
        from selenium.webdriver import Keys

        self.wait(lambda: self.field(label)).send_keys(Keys.CONTROL, "a", Keys.NULL, str(value), Keys.TAB)

    def shows(self, plain, guided):
        """Waits for a finished result with these values of L', to the digits that are shown."""

        def done():
            shown = self.text("#plain-score"), self.text("#guided-score")
            return self.text("#status").startswith("Done") and shown == (f"{plain:.4g}", f"{guided:.4g}")

        self.wait(done)

    def picture_widths(self):
        return self.browser.execute_script(
            "return [...document.querySelectorAll('figure img')].map(image => image.naturalWidth)"
        )


@pytest.mark.slow
def test_the_page_shows_what_the_pipeline_gives(tiny_unet, tmp_path, browser):
    pytest.importorskip("gradio")
    from selenium.webdriver import Keys

    folder = tmp_path / "model"
    make_pipeline(tiny_unet(num_class_embeds=3)).save_pretrained(folder)
    pipeline = RegDDPMPipeline.from_pretrained(folder)

    def expect(page, scale, **changed):
        plain, guided = (sampled(pipeline, s, **{"label": 0} | changed) for s in (0.0, scale))
        page.shows(plain, guided)
        return plain, guided

    with served(folder, "--regularizer", "symmetry", "total_variation") as url:
        browser.get(url)
        page = Page(browser)
        plain, guided = expect(page, 0.05, regularizer=symmetry)
        assert guided < plain
        assert len(page.picture_widths()) == 2 and min(page.picture_widths()) > 0
        assert "symmetry. Difference from the mirror image" in page.text("body")

        page.type("Regularizer scale", 0.1)
        assert expect(page, 0.1, regularizer=symmetry)[1] < guided
        browser.find_element("css selector", "input[aria-label='range slider for Regularizer scale']").send_keys(
            Keys.LEFT
        )
        expect(page, 0.095, regularizer=symmetry)
        page.type("Class label", 2)
        expect(page, 0.095, regularizer=symmetry, label=2)
        page.type("Noise seed", 7)
        expect(page, 0.095, regularizer=symmetry, label=2, seed=7)
        page.type("Images", 1)
        changed = {"label": 2, "seed": 7, "number": 1}
        expect(page, 0.095, regularizer=symmetry, **changed)

        # While it samples the pictures are there already, and a new wish does not wait for the end.
        page.type("Steps", 200)
        page.wait(lambda: page.text("#status").startswith("Step") and "of 200" in page.text("#status"))
        assert len(page.picture_widths()) == 2
        page.type("Steps", 4)
        expect(page, 0.095, regularizer=symmetry, steps=4, **changed)

        # Another visitor at the same time has drawings of their own.
        page.type("Steps", 100)
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        browser.get(url)
        expect(page, 0.05, regularizer=symmetry)
        browser.switch_to.window(first)
        expect(page, 0.095, regularizer=symmetry, steps=100, **changed)

        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert [address for address in asked if address.startswith("http") and not address.startswith(url)] == []

        page.type("Noise seed", -3)
        page.wait(lambda: "Noise seed must be a whole number from 0" in page.text("body"))


@pytest.mark.slow
def test_the_page_of_a_text_to_image_model_has_a_field_for_its_text(text_model, tmp_path, browser):
    pytest.importorskip("gradio")
    from selenium.webdriver import Keys

    record = {"data": {"shape": [3, 16, 16], "prompts": ["a dog", "a cat"]}}
    (tmp_path / "text" / "reg_config.json").write_text(json.dumps(record))
    with served(tmp_path / "text") as url:
        browser.get(url)
        page = Page(browser)
        page.shows(*(sampled_in_latents(text_model, "a dog", scale) for scale in (0.0, 0.05)))  # the recorded text
        assert "Class label" not in page.text("body")
        field = browser.find_element("css selector", "#controls [data-testid='textbox']")
        assert field.get_attribute("value") == "a dog"
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, "a cat", Keys.ENTER)
        page.shows(*(sampled_in_latents(text_model, "a cat", scale) for scale in (0.0, 0.05)))
        page.type("Regularizer scale", 0.5)  # other controls keep the text
        page.shows(*(sampled_in_latents(text_model, "a cat", scale) for scale in (0.0, 0.5)))
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_the_controls_follow_the_model_and_the_method(tiny_unet, browser):
    pytest.importorskip("gradio")
    pipeline = make_pipeline(tiny_unet())
    page = Page(browser)
    demo = build_demo(pipeline, {"total_variation": total_variation})
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        browser.get(url)
        page.shows(*(sampled(pipeline, scale) for scale in (0.0, 0.05)))
        assert "Class label" not in page.text("body") and "Text" not in page.text("#controls").split("\n")

        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        tops = "return ['#plain-picture', '#guided-picture', '#controls'].map("
        tops += "name => document.querySelector(name).getBoundingClientRect().top)"
        plain, guided, controls = browser.execute_script(tops)
        assert plain == guided < 200 and controls > plain + 300  # the pictures side by side, the controls below
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

        browser.find_element("css selector", "input[aria-label='Guidance method']").click()
        page.wait(lambda: browser.find_elements("css selector", "li[aria-label^='dps']"))[0].click()
        page.shows(*(sampled(pipeline, scale, method="dps") for scale in (0.0, 2.0)))
        assert page.field("Regularizer scale").get_attribute("max") == "20"
    finally:
        demo.close()


def test_a_port_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--port", "99999"])
    assert "argument --port: '99999' is not a port from 0 to 65535" in capsys.readouterr().err
