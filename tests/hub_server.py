"""Serves a small Hub on this machine: uploads, downloads and data sets, with faults on demand."""

import contextlib
import os
import re
import socket
import sys
import threading
from http.server import ThreadingHTTPServer

from hub_protocol import TOKEN, Handler


class HubServer:
    """A Hub for the user tester, on one port of this machine; as a context manager it serves in a thread.

    `stop` also cuts the connections that are open; `start` serves the same repositories on the same port again, and
    may be called at any time after the clients know the endpoint.

    Attributes:
        endpoint: for HF_ENDPOINT.
        repositories: by id; the id of a data set begins with "datasets/".
        objects: the large files that arrived, by sha256.
        requests: (method, path with its query) of every request so far.
        fails: answer every commit with status 500.
        read_only: the token may not write: answer 403 to whatever would change something.
        broken_uploads: of so many large files the connection breaks in the middle; counts down.
        takes_uploads: an event; while it is cleared, large files are not read, and nobody is told why.
        busy: answer 503 to so many requests whose path has a match of a pattern, {pattern: number}; counts down.
    """

    def __init__(self, fails=False):
        self.fails, self.read_only, self.broken_uploads, self.busy = fails, False, 0, {}
        self.repositories, self.objects, self.requests = {}, {}, []
        self.takes_uploads = threading.Event()
        self.takes_uploads.set()
        self.lock = threading.RLock()
        self._connections, self._thread = _Connections(0, self), None
        self.port = self._connections.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.large_file_host = f"http://localhost:{self.port}"

    @property
    def files(self):
        """The files on main, by repository and path."""
        return {name: repository.files for name, repository in self.repositories.items()}

    @property
    def private(self):
        return {name: repository.private for name, repository in self.repositories.items()}

    def start(self):
        self._connections.server_activate()
        self._thread = threading.Thread(target=self._connections.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def stop(self):
        self.takes_uploads.set()
        if self._thread is not None:
            self._connections.shutdown()
            self._connections.close_all()
            self._connections, self._thread = _Connections(self.port, self), None

    __enter__ = start

    def __exit__(self, *_):
        self.stop()
        self._connections.server_close()

    def breaks_upload(self):
        with self.lock:
            breaks = self.broken_uploads > 0
            self.broken_uploads -= breaks
        return breaks

    def is_busy(self, path):
        with self.lock:
            for pattern, number in self.busy.items():
                if number and re.search(pattern, path):
                    self.busy[pattern] -= 1
                    return True
        return False


def client_environment(hub, home, token=TOKEN):
    """The variables for a process whose Hub is `hub`, and whose caches are in the folder `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and not name.endswith("_OFFLINE") and "proxy" not in name.lower()
    }
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **variables, **({"HF_TOKEN": token} if token else {})}


class _Connections(ThreadingHTTPServer):
    """Holds a port, refusing connections until it is activated, and can cut all of them."""

    def __init__(self, port, hub):
        super().__init__(("127.0.0.1", port), Handler, bind_and_activate=False)
        self.hub, self.open = hub, set()
        self.server_bind()

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def close_all(self):
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is not an error of the server
            super().handle_error(request, client_address)
