"""The pictures of the demo's page in docs/guidance.md: what a browser shows of a real model, and what a phone shows.

    python docs/figures/demo.py --model reg-ddpm-model/plain

Needs gradio, selenium, chromium and chromedriver. Not the same bytes each time: browsers and gradio change.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver

IMAGES = Path(__file__).parents[1] / "images"
SIZES = {"demo.png": (1080, 1060, False), "demo_phone.png": (390, 844, True)}  # width, height, whether on a phone
FLAGS = "headless=new no-sandbox disable-gpu disable-dev-shm-usage hide-scrollbars no-first-run"
SECONDS = 600  # to draw everything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reg-ddpm-model/plain", help="folder of a pipeline")
    with served(parser.parse_args().model) as url, browser() as page:
        for name, (width, height, is_phone) in SIZES.items():
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            shoot(page, url, IMAGES / name)


def shoot(page, url: str, image: Path) -> None:
    """Opens the page, waits until it has drawn, and writes what is visible."""
    page.get(url)
    deadline = time.monotonic() + SECONDS
    while not page.execute_script("return document.querySelector('#status')?.innerText.startsWith('Done')"):
        if time.monotonic() > deadline:
            raise SystemExit("the page was not done in time")
        time.sleep(0.2)
    print(page.execute_script("return document.querySelector('#status').innerText"))
    page.save_screenshot(str(image))
    picture = Image.open(image).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(image, optimize=True)
    print(f"wrote docs/images/{image.name}, {image.stat().st_size // 1000} kB")


@contextmanager
def served(model: str):
    """The address of the page, which the real command serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "reg_diffusers", "demo", "--model", model, "--port", str(port)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield next(line for line in server.stdout if line.startswith("http")).split()[0]
        finally:
            server.terminate()


@contextmanager
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    opened = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield opened
    finally:
        opened.quit()


if __name__ == "__main__":
    main()
