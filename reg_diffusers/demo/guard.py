"""Restricts the requests to the demo server: by default, it serves the browser on this machine only."""

from __future__ import annotations

import ipaddress
import json
import socket
from urllib.parse import parse_qs, urlsplit

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

__all__ = ["LOCAL", "Guard", "guarded", "is_everywhere"]

LOCAL = "127.0.0.1"
_HOSTS = (LOCAL, "localhost", "::1")
_LARGEST_BODY = 2**16  # bytes; the page sends a few hundred
_UPLOADS = "/upload"
_JOIN, _EVENTS = "/queue/join", "/queue/data"
_SENT = (_JOIN, "/cancel", "/reset")  # paths that the page posts to


class Guard:
    """ASGI middleware that rejects requests which the demo page does not send, before the application sees them.

    A foreign host name in a request means DNS rebinding; a foreign origin means a page of another site in the same
    browser. The demo has no uploads.

    Args:
        app: the ASGI application to protect.
        served_to: the address that the server listens at. With all addresses (0.0.0.0), a request may use any address,
            but no name other than this machine's, because DNS rebinding needs a name.
    """

    def __init__(self, app, served_to: str = LOCAL):
        self._app = app
        self._served_to = served_to

    async def __call__(self, scope, receive, send) -> None:
        """Handles one ASGI request."""
        refusal = _refusal(scope, self._served_to) if scope["type"] in ("http", "websocket") else None
        if refusal is None and scope["type"] == "http":
            refusal, receive = await _unknown(scope, receive)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refusal
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, send)


def guarded(host: str = LOCAL) -> dict:
    """Returns the arguments of gradio's `launch` that protect a page at this address."""
    middleware = [Middleware(Guard, served_to=host)]
    return {"server_name": host, "app_kwargs": {"middleware": middleware}, "max_file_size": "1b"}


def is_everywhere(host: str) -> bool:
    """Whether a server at this address listens at all addresses of the machine."""
    return _address(host) is not None and _address(host).is_unspecified


def _address(host: str):
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_served(name: str | None, served_to: str) -> bool:
    """Whether a request may use this host name."""
    if name is None:
        return False
    if is_everywhere(served_to):
        own = socket.gethostname().lower()
        return name in (*_HOSTS, own, f"{own}.local") or _address(name) is not None
    return name == served_to.lower() or (name in _HOSTS and served_to in _HOSTS)


def _refusal(scope, served_to: str) -> tuple[int, str] | None:
    """Returns status and reason if the request must be rejected, judging by its headers; else None."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    names = [name.lower() for name, _ in scope["headers"]]
    if names.count(b"host") > 1 or names.count(b"origin") > 1:
        return 403, "a request must have one host and at most one origin"
    if not _is_served(_host_of(f"//{headers.get('host', '')}"), served_to):
        names = f"{LOCAL} or localhost" if served_to in _HOSTS else f"{served_to}, not under other names"
        return 403, f"this page is only served as {names}"
    # A page on another port of this machine is another origin, too.
    is_other = "origin" in headers and headers["origin"] != f"http://{headers['host']}"
    is_embedded = headers.get("sec-fetch-mode") != "navigate"
    if is_other or (is_embedded and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
        return 403, "requests from other pages are rejected"
    if scope["path"].rstrip("/").endswith(_UPLOADS):
        return 403, "uploads are not supported"
    size = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not size.isdigit() or int(size) > _LARGEST_BODY:
        return 413, f"requests must state a length of at most {_LARGEST_BODY:,} bytes"
    return None


async def _unknown(scope, receive) -> tuple[tuple[int, str] | None, object]:
    """Rejects requests that gradio would answer with a traceback; returns a `receive` that replays the body read."""
    path, blocks = scope["path"].rstrip("/"), scope["app"].get_blocks()
    if path.endswith(_EVENTS):
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        if session not in blocks._queue.pending_messages_per_session:
            return (404, "this session has no pending request: reload the page"), receive
    is_post = scope["method"] == "POST"
    if "/call/" in path or (is_post and not path.endswith(_SENT)):
        return (404, "this page does not send such requests"), receive
    if not is_post or not path.endswith(_JOIN):
        return None, receive
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body, messages = b"".join(message.get("body", b"") for message in messages), iter(messages)

    async def again():
        return next(messages, None) or await receive()

    return _unknown_function(body, blocks.fns), again


def _unknown_function(body: bytes, functions) -> tuple[int, str] | None:
    try:
        wanted = json.loads(body)
        number, data = wanted["fn_index"], wanted["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 422, "a request must contain fn_index and data"
    function = functions.get(number) if isinstance(number, int) else None
    if function is None:
        return 404, f"this page has no function {number!r:.40}"
    if not isinstance(data, list) or len(data) != len(function.inputs):
        return 422, f"function {number} expects a list of {len(function.inputs)} inputs"
    return None


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
