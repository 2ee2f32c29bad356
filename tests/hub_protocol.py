"""Answers HTTP requests as the Hub does."""

import base64
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_storage import Refusal, Repository, etag, is_large, sha256

TOKEN, OWNER = "hf_test_token", "tester"
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "openrail", "other", "unknown")  # a few of those that the Hub knows
ROUTES = []
REPOSITORY, REVISION, PATH = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<path>.+)"
API = rf"/api/(?P<kind>models|datasets)/{REPOSITORY}"
PAGE = rf"/(?P<kind>datasets/)?{REPOSITORY}"


def route(method, pattern, writes=False):
    """The decorated method answers the requests with this path; the groups of the pattern are its arguments.

    The groups of a repository arrive as one Repository, if the token may see it.
    """

    def register(function):
        ROUTES.append((method, re.compile(pattern), function, writes))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection; `server.hub` has the repositories and the faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def take(self):
        self.hub = self.server.hub
        self.hub.requests.append((self.command, self.path))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if self.command == "PUT":
            self.hub.takes_uploads.wait()
            if self.hub.breaks_upload():
                return self.break_connection()
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.hub.is_busy(self.path):
                raise Refusal(503, "Service Unavailable")
            self.dispatch(url.path)
        except Refusal as refusal:
            self.answer({"error": refusal.message}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = take

    def dispatch(self, path):
        for method, pattern, function, writes in ROUTES:
            found = pattern.fullmatch(path)
            if found and method == self.command.replace("HEAD", "GET"):
                arguments = {name: unquote(value or "") for name, value in found.groupdict().items()}
                if writes:
                    self.check_writer(arguments.get("name", f"{OWNER}/").split("/")[0])
                if "name" in arguments:
                    prefix = "datasets/" if arguments.pop("kind").startswith("datasets") else ""
                    arguments["repository"] = self.repository(prefix + arguments.pop("name"))
                return function(self, **arguments)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def answer(self, body=None, status=200, **headers):
        """Sends JSON, or the content of a file."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("content_type", "application/json")
        for name, value in {"content_length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def break_connection(self):
        self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def check_token(self):
        """Whether there is a token; a wrong one is refused everywhere, also for what is public."""
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given is not None

    def check_writer(self, namespace):
        if not self.check_token():
            raise Refusal(401, "Invalid username or password.")
        if self.hub.read_only or namespace != OWNER:
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace}")

    def repository(self, name):
        known = self.check_token()
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        return repository

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if not self.check_token():
            raise Refusal(401, "Invalid username or password.")
        self.answer({"name": OWNER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/validate-yaml")
    def validate_card(self):
        found = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        license = (yaml.safe_load(found[1]) if found else {}).get("license")
        if license in (None, *LICENSES):
            return self.answer({"errors": [], "warnings": []})
        message = f'"license" must be one of [{", ".join(LICENSES)}]'
        if self.headers.get("Accept") == "text/plain":
            return self.answer(message.encode(), 400, content_type="text/plain")
        self.answer({"errors": [{"message": message}], "warnings": []}, 400)

    @route("POST", "/api/repos/create", writes=True)
    def create(self):
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        namespace = wanted.get("organization") or OWNER
        self.check_writer(namespace)
        name = f"{namespace}/{wanted['name']}"
        full_name = f"datasets/{name}" if kind == "dataset" else name
        answer = {"url": f"{self.hub.endpoint}/{full_name}", "name": name}
        with self.hub.lock:
            if full_name in self.hub.repositories:
                return self.answer({**answer, "error": f"You already created this {kind} repo"}, 409)
            private = wanted.get("visibility") == "private" or wanted.get("private", False)
            self.hub.repositories[full_name] = Repository(full_name, private)
        self.answer(answer)

    @route("GET", rf"{API}(/revision/{REVISION})?")
    def information(self, repository, revision):
        commit = repository.at(revision or "main")
        author, name = repository.id.removeprefix("datasets/").split("/")
        self.answer({
            "id": f"{author}/{name}", "author": author, "sha": commit.oid, "private": repository.private,
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
        })  # fmt: skip

    @route("GET", rf"{API}/auth-check/write", writes=True)
    def check_right_to_write(self, repository):
        self.answer()

    @route("GET", rf"{API}/refs")
    def references(self, repository):
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.heads.items()
            if not name.startswith("refs/")
        ]
        self.answer({"branches": heads, "tags": [], "converts": []})

    @route("POST", rf"{API}/branch/{REVISION}", writes=True)
    def make_branch(self, repository, revision):
        repository.branch(revision, json.loads(self.body).get("startingPoint") or "main")
        self.answer()

    @route("GET", rf"{API}/tree/{REVISION}(/{PATH})?")
    def tree(self, repository, revision, path):
        self.answer(repository.tree(revision, path, recursive=self.query.get("recursive", [""])[0].lower() == "true"))

    @route("POST", rf"{API}/paths-info/{REVISION}")
    def paths_info(self, repository, revision):
        self.answer(repository.entries(revision, parse_qs(self.body.decode())["paths"]))

    @route("POST", rf"{API}/preupload/{REVISION}", writes=True)
    def preupload(self, repository, revision):
        files = repository.at(revision).files
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [
            {"path": path, "shouldIgnore": False, "uploadMode": "lfs" if is_large(path) else "regular",
             "oid": etag(path, files[path]) if path in files else None}
            for path in paths
        ]  # fmt: skip
        self.answer({"files": modes})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", writes=True)
    def batch(self, repository):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.large_file_host}/upload/{entry['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repository.id}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/upload/(?P<oid>[0-9a-f]{64})")
    def store(self, oid):
        if sha256(self.body) != oid:
            raise Refusal(400, "The sha256 of the content is another one")
        self.hub.objects[oid] = self.body
        self.answer()

    @route("POST", rf"{PAGE}\.git/info/lfs/verify", writes=True)
    def verify(self, repository):
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        self.answer()

    @route("POST", rf"{API}/commit/{REVISION}", writes=True)
    def commit(self, repository, revision):
        if self.hub.fails:
            raise Refusal(500, "out of order")
        added, deleted, header = {}, [], {}
        for operation in map(json.loads, self.body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"Your push was rejected: {value['path']} was not uploaded")
                added[value["path"]] = self.hub.objects[value["oid"]]
            else:
                deleted.append(value["path"].rstrip("/") + "/" * (key == "deletedFolder"))
        page, more = f"{self.hub.endpoint}/{repository.id}", {}
        with self.hub.lock:
            if "create_pr" in self.query:
                number = len([name for name in repository.heads if name.startswith("refs/pr/")]) + 1
                repository.branch(f"refs/pr/{number}", revision)
                revision, more = f"refs/pr/{number}", {"pullRequestUrl": f"{page}/discussions/{number}"}
            commit = repository.commit(revision, header["summary"], added, deleted, header.get("parentCommit"))
        self.answer({"commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}", **more})

    @route("GET", rf"{PAGE}/resolve/{REVISION}/{PATH}")
    def download(self, repository, revision, path):
        content, commit = repository.content(revision, path), repository.at(revision).oid
        tag = f'"{etag(path, content)}"'
        if not is_large(path):
            return self.send_file(content, tag, x_repo_commit=commit)
        self.answer(
            status=302,
            location=f"{self.hub.large_file_host}/large/{sha256(content)}",
            x_repo_commit=commit,
            x_linked_etag=tag,
            x_linked_size=len(content),
        )

    @route("GET", "/large/(?P<oid>[0-9a-f]{64})")
    def download_large(self, oid):
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")
        content = self.hub.objects.get(oid)
        if content is None:
            raise Refusal(403, "Access denied")
        self.send_file(content, f'"{oid}"')

    def send_file(self, content, tag, **headers):
        """Sends a file, or the range of it that was asked for."""
        headers |= {"etag": tag, "accept_ranges": "bytes", "content_type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, **headers)
        first, last = asked.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self.answer(status=416, content_range=f"bytes */{len(content)}")
        self.answer(content[start:end], 206, content_range=f"bytes {start}-{end - 1}/{len(content)}", **headers)
