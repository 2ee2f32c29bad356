"""The demo serves the browser on this machine: it rejects others, and answers "busy" to too many at once."""

import asyncio
import http.client
import json
import logging
import socket
import threading
from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.demo import build_demo
from reg_diffusers.regularizers import total_variation

pytestmark = pytest.mark.sampling


@pytest.fixture(scope="module")
def port():
    pytest.importorskip("gradio")
    import torch
    from diffusers import UNet2DModel

    from reg_diffusers.demo.guard import guarded

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    page = build_demo(RegDDPMPipeline(unet.eval(), DDPMScheduler()), {"total_variation": total_variation})
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, **guarded())
    yield int(url.rstrip("/").rpartition(":")[2])
    page.close()


def ask(port, method="GET", path="/", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_this_machine_is_answered(port):
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost"):
        status, text = ask(port, Host=host)
        assert status == 200 and "gradio" in text
    assert ask(port, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    assert ask(port, Host=f"localhost:{port}", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example"])
def test_other_host_names_are_refused(port, host):
    """A name that somebody has bound to 127.0.0.1 would let their page read this one."""
    assert ask(port, Host=host)[0] == 403


@pytest.mark.parametrize(
    ("served_to", "name", "answered"),
    [
        ("0.0.0.0", "192.168.1.7", True),
        ("0.0.0.0", "localhost", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "evil.example", False),
        ("::", "[fe80::1]", True),
        ("192.168.1.7", "192.168.1.7", True),
        ("192.168.1.7", "192.168.1.8", False),
        ("192.168.1.7", "localhost", False),
        ("localhost", "127.0.0.1", True),
        ("127.0.0.1", "192.168.1.7", False),
    ],
)
def test_another_address_answers_to_addresses_and_to_no_foreign_name(served_to, name, answered):
    pytest.importorskip("gradio")
    from starlette.responses import PlainTextResponse

    from reg_diffusers.demo.guard import Guard

    async def app(scope, receive, send):
        await PlainTextResponse("the page")(scope, receive, send)

    async def request():
        found = []

        async def send(message):
            found.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "app": SimpleNamespace()}
        scope["app"].get_blocks = lambda: None
        scope["headers"] = [(b"host", f"{name}:7860".encode())]
        await Guard(app, served_to)(scope, None, send)
        return found[0]["status"]

    assert asyncio.run(request()) == (200 if answered else 403)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:9"]
)
def test_other_origins_are_refused(port, origin):
    status, text = ask(port, "POST", "/gradio_api/queue/join", "{}", Origin=origin, Content_Type="application/json")
    assert status == 403 and "other pages" in text


def test_what_another_page_embeds_is_refused(port):
    assert ask(port, path="/config", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403


def test_uploads_and_large_requests_are_refused(port):
    assert ask(port, "POST", "/gradio_api/upload", b"x" * 100)[0] == 403
    assert ask(port, "POST", "/gradio_api/queue/join", b"x" * 10**6)[0] == 413


def test_parallel_requests_get_answers_or_a_clear_word(port):
    """And a scheduler, a regularizer or a method that is none gets a message instead of a traceback."""
    status, config = ask(port, path="/config")
    assert status == 200
    config = json.loads(config)
    number = next(entry["id"] for entry in config["dependencies"] if len(entry["inputs"]) == 9)
    said = []

    def draw(place, data):
        session = f"s{place}"
        body = json.dumps({"data": data, "fn_index": number, "session_hash": session})
        status, text = ask(port, "POST", "/gradio_api/queue/join", body, Content_Type="application/json")
        if status == 200:
            status, text = ask(port, path=f"/gradio_api/queue/data?session_hash={session}")
        said.append((place, status, text))

    good = ["total_variation", "mpgd", 0.05, 0, 2, "DDIM", 1, 0, ""]
    threads = [threading.Thread(target=draw, args=(place, good)) for place in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    answered = {place for place, status, text in said if status == 200 and '"success":true' in text.replace(" ", "")}
    busy = {place for place, status, text in said if "Queue is full" in text}
    assert answered | busy == set(range(20)) and len(answered) >= 8

    wrong = {
        "Scheduler must be one of DDIM": [*good[:5], "no such", *good[6:]],
        "Regularizer must be one of total_variation": ["no such", *good[1:]],
        "Guidance method must be one of mpgd": [good[0], ["x"], *good[2:]],
    }
    for place, (message, data) in enumerate(wrong.items(), 20):
        draw(place, data)
        assert message in said[-1][2]


@pytest.mark.parametrize(
    ("path", "asked", "status", "reason"),
    [
        ("queue/join", {"data": [], "fn_index": 9999}, 404, "this page has no function 9999"),
        ("queue/join", {"data": [], "fn_index": -1}, 404, "this page has no function -1"),
        ("queue/join", {"data": [], "fn_index": [1]}, 404, "this page has no function [1]"),
        ("queue/join", {"data": [], "fn_index": 0}, 422, "function 0 expects a list of 9 inputs"),
        ("queue/join", {"data": "draw it", "fn_index": 0}, 422, "function 0 expects a list of 9 inputs"),
        ("queue/join", {"data": []}, 422, "a request must contain fn_index and data"),
        ("queue/join", [], 422, "a request must contain fn_index and data"),
        ("run/predict", {"data": [], "fn_index": 9999}, 404, "this page does not send such requests"),
        ("api/draw", {"data": []}, 404, "this page does not send such requests"),
        ("call/draw", {"data": []}, 404, "this page does not send such requests"),
        ("call/draw/no_event", None, 404, "this page does not send such requests"),
        ("queue/data?session_hash=unknown", None, 404, "this session has no pending request"),
    ],
)
def test_what_the_page_does_not_know_is_said_without_a_traceback(port, caplog, path, asked, status, reason):
    """gradio answered with 500, or cut the answer off, and wrote a traceback to the terminal."""
    server = logging.getLogger("uvicorn.error")
    server.addHandler(caplog.handler)
    try:
        body = asked if asked is None else json.dumps({**asked, "session_hash": "s"} if asked else asked)
        method = "GET" if asked is None else "POST"
        found, text = ask(port, method, f"/gradio_api/{path}", body, Content_Type="application/json")
    finally:
        server.removeHandler(caplog.handler)
    assert (found, reason in text) == (status, True), text
    assert not caplog.records
