"""A small server that speaks as much of the Hub's protocol as an upload needs."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test_token"


class HubServer(ThreadingHTTPServer):
    """A Hub for one user on a free port of this machine; `files` maps repository and path to content.

    Used as a context manager, it serves in a thread. With `fails` it answers every commit with status 500.
    """

    def __init__(self, fails=False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files, self.objects, self.private, self.fails = {}, {}, {}, fails

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=None, status=200, headers=()):
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(content))), *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        self.answer({"error": "not found"}, 404, [("X-Error-Code", "EntryNotFound")])

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_POST(self):
        body = self.body()
        hub = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "verify" not in self.path:
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            hub.files.setdefault(repo_id, {})
            hub.private[repo_id] = wanted.get("visibility") == "private" or wanted.get("private", False)
            return self.answer({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.endpoint}/upload/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/.+", self.path):
            return self.commit(found.group(1), [json.loads(line) for line in body.splitlines()])
        self.answer({"error": "not found"}, 404)

    def commit(self, repo_id, operations):
        hub = self.server
        if hub.fails:
            return self.answer({"error": "out of order"}, 500)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                hub.files[repo_id][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in hub.objects:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                hub.files[repo_id][value["path"]] = hub.objects[value["oid"]]
        self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{'0' * 40}"})
