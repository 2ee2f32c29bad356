"""The Hub of the tests, by the real clients in processes of their own."""

import hashlib
import http.client
import json
import subprocess
import sys
import textwrap

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from hub_server import TOKEN, HubServer, client_environment
from hub_storage import Repository

pytestmark = pytest.mark.hub

PRELUDE = """
import json, sys
from huggingface_hub import HfApi, HfFileSystem, snapshot_download

api = HfApi()

def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__} {error.response.status_code}" if hasattr(error, "response") else repr(error)

def tell(**facts):
    print(json.dumps(facts))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(tmp_path):
    """Runs a script in a process whose Hub is `hub`, and returns what it told."""

    def run(hub, script, *arguments, token=TOKEN):
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)],
            env=client_environment(hub, tmp_path / "hf", token),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def folder(tmp_path):
    """A folder with files that git stores, files that LFS stores, and an empty one."""
    files = {
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "config/empty.json": b"",
        "samples/0.png": b"first picture",
        "samples/1.png": b"second picture",
        "unet/weights.safetensors": bytes(range(256)) * 1000,
    }
    for path, content in files.items():
        write(tmp_path / "folder" / path, content)
    return tmp_path / "folder"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count(hub, method, part):
    return sum(asked == method and part in path for asked, path in hub.requests)


def ask(hub, method, path, body=None, token=TOKEN, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", hub.port)
    connection.request(method, path, body, {**headers, **({"Authorization": f"Bearer {token}"} if token else {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_each_commit_of_a_folder_is_downloaded_as_it_was(hub, client, folder, tmp_path):
    first = contents(folder)
    script = """
        from pathlib import Path
        folder, copies = Path(sys.argv[1]), Path(sys.argv[2])
        url = api.create_repo("tester/model")
        again = api.create_repo("tester/model", exist_ok=True)
        twice = error_of(api.create_repo, "tester/model")

        oids = [api.upload_folder(repo_id="tester/model", folder_path=folder).oid]
        (folder / "unet/weights.safetensors").write_bytes(b"trained")
        (folder / "README.md").write_text("# Trained")
        oids.append(api.upload_folder(repo_id="tester/model", folder_path=folder).oid)
        unchanged = api.upload_folder(repo_id="tester/model", folder_path=folder).oid
        oids.append(api.delete_folder("samples", "tester/model").oid)
        oids.append(api.delete_file("config/empty.json", "tester/model").oid)

        for oid in oids:
            snapshot_download("tester/model", revision=oid, local_dir=copies / oid)
        cached = snapshot_download("tester/model")
        tell(urls=[str(url), str(again)], twice=twice, oids=oids, unchanged=unchanged, cached=cached)
    """
    told = client(hub, script, folder, tmp_path / "copies")
    assert told["urls"] == [f"{hub.endpoint}/tester/model"] * 2 and told["twice"] == "HfHubHTTPError 409"
    assert len(set(told["oids"])) == 4 and told["unchanged"] == told["oids"][1]
    assert count(hub, "PUT", "/upload/") == 4 and count(hub, "POST", "/commit/") == 4

    second = {**first, "unet/weights.safetensors": b"trained", "README.md": b"# Trained"}
    third = {path: content for path, content in second.items() if not path.startswith("samples/")}
    fourth = {path: content for path, content in third.items() if path != "config/empty.json"}
    for oid, files in zip(told["oids"], (first, second, third, fourth), strict=True):
        copy = contents(tmp_path / "copies" / oid)
        assert {path: copy[path] for path in copy if not path.startswith(".cache/")} == files
    cached = tmp_path / "hf" / "hub" / "models--tester--model" / "snapshots" / told["oids"][-1]
    assert told["cached"] == str(cached) and contents(cached) == fourth == hub.files["tester/model"]


def test_a_private_repository_is_there_for_its_owner_only(hub, client, folder, tmp_path):
    script = """
        api.create_repo("tester/secret", private=True)
        api.create_repo("tester/open", private=False)
        for name in ("secret", "open"):
            api.upload_folder(repo_id=f"tester/{name}", folder_path=sys.argv[1])
        facts = {}
        for who, token in (("owner", None), ("stranger", False), ("impostor", "hf_wrong")):
            cache = f"{sys.argv[2]}/{who}"  # what is in the cache is given to everybody
            for name in ("secret", "open"):
                loaded = error_of(
                    api.hf_hub_download, f"tester/{name}", "samples/0.png", token=token, cache_dir=cache
                )
                listed = error_of(api.list_repo_files, f"tester/{name}", token=token)
                facts |= {f"{who} loads {name}": loaded, f"{who} lists {name}": listed}
            facts[f"{who} uploads"] = error_of(
                api.upload_file, path_or_fileobj=b"new", path_in_repo="new.txt", repo_id="tester/open", token=token
            )
            facts[f"{who} asks"] = error_of(api.whoami, token=token or None) if token is not False else None
        tell(**facts, private=api.model_info("tester/secret").private)
    """
    told = client(hub, script, folder, tmp_path / "caches")
    assert told.pop("private") and hub.private == {"tester/secret": True, "tester/open": False}
    assert {what: error for what, error in told.items() if error} == {
        "stranger loads secret": "RepositoryNotFoundError 401",
        "stranger lists secret": "RepositoryNotFoundError 401",
        "stranger uploads": "HfHubHTTPError 401",
        "impostor loads secret": "HfHubHTTPError 401",
        "impostor lists secret": "HfHubHTTPError 401",
        "impostor loads open": "HfHubHTTPError 401",
        "impostor lists open": "HfHubHTTPError 401",
        "impostor uploads": "HfHubHTTPError 401",
        "impostor asks": "HfHubHTTPError 401",
    }


def test_what_is_not_there_is_said_as_the_hub_says_it(hub, client, folder):
    script = """
        api.create_repo("tester/model")
        head = api.upload_folder(repo_id="tester/model", folder_path=sys.argv[1]).oid
        api.create_branch("tester/model", branch="side")
        side = api.upload_file(path_or_fileobj=b"1", path_in_repo="a/1.txt", repo_id="tester/model", revision="side")
        proposal = api.upload_file(path_or_fileobj=b"2", path_in_repo="2.txt", repo_id="tester/model", create_pr=True)
        tell(
            file=error_of(api.hf_hub_download, "tester/model", "none.txt"),
            revision=error_of(api.hf_hub_download, "tester/model", "README.md", revision="none"),
            repository=error_of(api.model_info, "tester/none"),
            kind=error_of(api.dataset_info, "tester/model"),
            folder=error_of(lambda: list(api.list_repo_tree("tester/model", "none"))),
            deleted=error_of(api.delete_file, "none.txt", "tester/model"),
            outdated=error_of(api.delete_file, "README.md", "tester/model", revision="side", parent_commit=head),
            exists=[api.file_exists("tester/model", name) for name in ("README.md", "a/1.txt", "2.txt")],
            branches={ref.name: ref.target_commit for ref in api.list_repo_refs("tester/model").branches},
            expected={"main": head, "side": side.oid},
            proposal=[proposal.pr_revision, api.file_exists("tester/model", "2.txt", revision="refs/pr/1")],
            top=[entry.path for entry in api.list_repo_tree("tester/model")],
            sizes=[entry.size for entry in api.get_paths_info("tester/model", ["samples/1.png", "none.txt"])],
            part=HfFileSystem().read_block("tester/model/unet/weights.safetensors", 1000, 4).hex(),
        )
    """
    told = client(hub, script, folder)
    missing, _ = ask(hub, "HEAD", "/tester/model/resolve/main/none.txt")
    assert missing.headers["X-Error-Code"] == "EntryNotFound"
    assert missing.headers["X-Repo-Commit"] == told["expected"]["main"]
    assert told["file"] == told["folder"] == told["deleted"] == "RemoteEntryNotFoundError 404"
    assert told["repository"] == told["kind"] == "RepositoryNotFoundError 404"
    assert told["revision"] == "RevisionNotFoundError 404" and told["outdated"] == "HfHubHTTPError 412"
    assert told["exists"] == [True, False, False] and told["branches"] == told["expected"]
    assert told["proposal"] == ["refs/pr/1", True]
    assert told["top"] == ["config", "samples", "unet", "README.md"]
    assert told["sizes"] == [len(b"second picture")] and told["part"] == bytes(range(232, 236)).hex()


@pytest.mark.slow
def test_a_pipeline_is_loaded_by_the_name_of_its_repository(hub, client, tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler(4)).save_pretrained(tmp_path / "saved")
    script = """
        from diffusers import DDPMPipeline
        api.create_repo("tester/tiny", private=True)
        api.upload_folder(repo_id="tester/tiny", folder_path=sys.argv[1])
        pipeline = DDPMPipeline.from_pretrained("tester/tiny")
        pipeline.save_pretrained(sys.argv[2])
        tell(shape=pipeline(num_inference_steps=1, output_type="np").images.shape)
    """
    assert client(hub, script, tmp_path / "saved", tmp_path / "loaded")["shape"] == [1, 8, 8, 1]
    saved, loaded = contents(tmp_path / "saved"), contents(tmp_path / "loaded")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert saved[weights] == loaded[weights] == hub.files["tester/tiny"][weights] and saved.keys() == loaded.keys()


def test_a_data_set_is_pushed_and_loaded_by_the_name_of_its_repository(hub, client, image_folder):
    script = """
        import datasets
        pictures = datasets.load_dataset(sys.argv[1], split="train")
        pictures.push_to_hub("tester/pictures", private=True)
        pictures.select([0]).push_to_hub("tester/pictures", split="test")
        loaded = datasets.load_dataset("tester/pictures")
        first = next(iter(datasets.load_dataset("tester/pictures", split="train", streaming=True)))
        api.create_repo("tester/folder", repo_type="dataset")
        api.upload_folder(repo_id="tester/folder", folder_path=sys.argv[1], repo_type="dataset")
        folder = datasets.load_dataset("tester/folder", split="train")

        pixels = lambda rows: [[row["image"].tobytes().hex(), row["label"]] for row in rows]
        tell(
            pushed=pixels(pictures), loaded=pixels(loaded["train"]), first=pixels([first]), folder=pixels(folder),
            test=len(loaded["test"]), names=folder.features["label"].names,
        )
    """
    told = client(hub, script, image_folder())
    assert told["loaded"] == told["folder"] == told["pushed"] and told["first"] == told["pushed"][:1]
    assert len(told["pushed"]) == 8 and told["test"] == 1 and told["names"] == ["cats", "dogs"]
    assert set(hub.files["datasets/tester/pictures"]) == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }
    assert hub.private == {"datasets/tester/pictures": True, "datasets/tester/folder": False}


def test_the_client_tries_again_what_it_stores_but_neither_creates_nor_commits_twice(hub, client, folder):
    """As huggingface_hub does it: a second after the first failure, and no word to the caller."""
    hub.broken_uploads = 1
    hub.busy = {"/repos/create": 1, "/preupload/": 1, "/commit/": 1}
    script = """
        errors = [error_of(api.create_repo, "tester/model") for _ in range(2)]
        errors += [error_of(api.upload_folder, repo_id="tester/model", folder_path=sys.argv[1]) for _ in range(2)]
        tell(errors=errors)
    """
    assert client(hub, script, folder)["errors"] == ["HfHubHTTPError 503", None] * 2
    assert hub.broken_uploads == 0 and set(hub.busy.values()) == {0}
    assert count(hub, "POST", "/repos/create") == 2 and count(hub, "POST", "/commit/") == 2
    assert count(hub, "POST", "/preupload/") == 3
    assert count(hub, "PUT", "/upload/") == 4  # of three large files; after the failed commit they are there
    assert hub.files["tester/model"] == contents(folder)


def test_a_token_that_may_not_write_opens_what_is_there(hub, client, folder):
    for name in ("tester/old", "other/theirs"):
        hub.repositories[name] = Repository(name)
    others = """
        tell(
            new=error_of(api.create_repo, "other/new"),
            right=error_of(api.auth_check, "other/theirs", write=True),
        )
    """
    assert client(hub, others) == dict.fromkeys(("new", "right"), "HfHubHTTPError 403")
    hub.read_only = True
    script = """
        tell(
            right=error_of(api.auth_check, "tester/old", write=True),
            new=error_of(api.create_repo, "tester/new", exist_ok=True),
            old=error_of(api.create_repo, "tester/old", exist_ok=True),
            upload=error_of(api.upload_folder, repo_id="tester/old", folder_path=sys.argv[1]),
            name=api.whoami()["name"],
        )
    """
    told = client(hub, script, folder)
    refused = dict.fromkeys(("right", "new", "upload"), "HfHubHTTPError 403")
    assert told == {**refused, "old": None, "name": "tester"}
    assert hub.files == {"tester/old": {}, "other/theirs": {}}


def test_a_card_with_a_licence_that_nobody_knows_is_refused(hub, client):
    script = """
        api.create_repo("tester/model")
        errors = []
        for license in ("mit", "free"):
            card = f"---\\nlicense: {license}\\n---\\n".encode()
            call = dict(path_or_fileobj=card, path_in_repo="README.md", repo_id="tester/model")
            try:
                errors.append(bool(api.upload_file(**call)))
            except ValueError as error:
                errors.append(str(error))
        tell(errors=errors)
    """
    accepted, refused = client(hub, script)["errors"]
    assert accepted is True and '"license" must be one of [apache-2.0' in refused
    assert hub.files["tester/model"]["README.md"] == b"---\nlicense: mit\n---\n"


def test_a_stopped_server_is_gone_and_comes_back_with_what_it_had(hub, client):
    connection = http.client.HTTPConnection("127.0.0.1", hub.port)
    connection.request("GET", "/api/whoami-v2")
    connection.getresponse().read()
    hub.repositories["tester/model"] = Repository("tester/model")
    hub.stop()
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        connection.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        http.client.HTTPResponse(connection.sock).begin()
    assert "ConnectError" in client(hub, "tell(error=error_of(api.whoami))")["error"]
    hub.start()
    assert json.loads(ask(hub, "GET", "/api/models/tester/model")[1])["id"] == "tester/model"


def test_a_client_sees_no_settings_but_those_for_the_server(hub, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "https_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    variables = client_environment(hub, tmp_path, token=None)
    assert variables["HF_ENDPOINT"] == hub.endpoint and variables["HF_HOME"] == str(tmp_path)
    assert "KEPT" in variables and "HF_TOKEN" not in variables and "HF_HUB_CACHE" not in variables
    assert not [name for name in variables if name.endswith("_OFFLINE") or "proxy" in name.lower()]


def test_only_what_arrived_whole_is_stored_and_committed(hub):
    hub.repositories["tester/model"] = Repository("tester/model")
    oid = hashlib.sha256(b"weights").hexdigest()
    lines = [
        {"key": "header", "value": {"summary": "Upload"}},
        {"key": "lfsFile", "value": {"path": "weights.bin", "oid": oid, "size": 7}},
    ]
    commit = ("POST", "/api/models/tester/model/commit/main", "\n".join(map(json.dumps, lines)))
    verify = ("POST", "/tester/model.git/info/lfs/verify", json.dumps({"oid": oid, "size": 7}))
    assert ask(hub, "PUT", f"/upload/{oid}", b"weight", token=None)[0].status == 400 and not hub.objects
    assert ask(hub, *verify)[0].status == 404 and ask(hub, *commit)[0].status == 400
    assert hub.files["tester/model"] == {} and len(hub.repositories["tester/model"].commits) == 1
    assert ask(hub, "PUT", f"/upload/{oid}", b"weights", token=None)[0].status == 200
    assert ask(hub, *verify)[0].status == 200 and ask(hub, *commit)[0].status == 200
    assert hub.files["tester/model"] == {"weights.bin": b"weights"}


@pytest.mark.parametrize(
    ("asked", "status", "content", "answered"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_ranges_of_a_file(hub, name, asked, status, content, answered):
    hub.repositories["tester/model"] = repository = Repository("tester/model")
    digest = hashlib.sha256(b"0123456789").hexdigest()
    hub.objects[digest] = b"0123456789"
    commit = repository.commit("main", "Upload", {name: b"0123456789"})
    page = f"/tester/model/resolve/main/{name}"
    if name == "a.bin":
        answer, _ = ask(hub, "HEAD", page)
        assert answer.status == 302 and answer.headers["X-Repo-Commit"] == commit.oid
        assert answer.headers["X-Linked-Etag"] == f'"{digest}"' and answer.headers["X-Linked-Size"] == "10"
        host, page = answer.headers["Location"].split("/large/")
        assert host == f"http://localhost:{hub.port}" and ask(hub, "GET", f"/large/{page}")[0].status == 400
        page = f"/large/{page}"
    answer, sent = ask(hub, "GET", page, token=None, Range=asked)
    assert (answer.status, sent, answer.headers["Content-Range"]) == (status, content, answered)


def test_equal_histories_have_equal_hashes():
    def history(*titles):
        repository = Repository("tester/model")
        return [repository.commit("main", title, {"a": b"1"}).oid for title in titles]

    assert history("one", "one", "two") == history("one", "one", "two") and len(set(history("one", "one"))) == 2
    assert history("one") != history("two") and all(len(oid) == 40 for oid in history("one"))
