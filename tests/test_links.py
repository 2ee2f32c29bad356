"""What counts as part of a folder, and uploads that refuse the rest before anything is sent."""

import json
import subprocess
import sys

import pytest

from reg_diffusers.hub.card import copy_evidence
from reg_diffusers.runtime.links import check_links, is_part_of
from reg_diffusers.sampling.hub_samples import upload_samples
from reg_diffusers.sampling.store import PictureFolder

pytestmark = pytest.mark.hub


@pytest.fixture
def folder(tmp_path):
    """A folder of a run, beside a secret."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for name in ("reg_config.json", "samples/a.png"):
        (tmp_path / "run" / name).write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def snapshot(tmp_path):
    """A model in the cache of the Hub, with a blob of its own and one that all repositories share."""
    repository = tmp_path / "hub" / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    for blob in (repository / "blobs" / "1", shared):
        blob.write_text("{}")
    (repository / "blobs" / "2").symlink_to(shared)
    folder = repository / "snapshots" / "abc"
    (folder / "samples").mkdir(parents=True)
    (folder / "reg_config.json").symlink_to("../../blobs/1")
    (folder / "samples" / "a.png").symlink_to("../../../blobs/2")
    return folder


def test_links_within_a_folder_are_part_of_it(folder):
    (folder / "again").symlink_to("samples/a.png")
    (folder / "more").symlink_to("samples")
    (folder.parent / "link").symlink_to(folder)
    check_links(folder)
    check_links(folder.parent / "link")
    assert is_part_of(str(folder / "more" / "a.png"), str(folder.parent / "link"))
    assert not is_part_of(str(folder / "more" / ".." / ".." / "secret" / "key"), str(folder))


@pytest.mark.parametrize("name", ["x", "samples/x", "unet"])
@pytest.mark.parametrize("target", ["key", "", "nothing"])
def test_links_out_of_a_folder_are_named(folder, name, target):
    (folder / name).symlink_to(folder.parent / "secret" / target)
    with pytest.raises(ValueError, match=f"run/{name} is a link out of .*run, which is not uploaded: replace it"):
        check_links(folder)
    check_links(folder, ("reg_config.json",))
    check_links(folder, ignored=("x", "samples/*", "unet/*"))


def test_the_cache_of_the_hub_links_to_its_own_blobs_alone(snapshot):
    check_links(snapshot)
    check_links(snapshot / "samples")
    other = snapshot.parents[2] / "models--user--other" / "blobs"
    other.mkdir(parents=True)
    for place in (other / "1", snapshot.parents[2] / "token", snapshot.parents[2] / "blobs" / "token"):
        place.write_text("secret")
        (snapshot / "link").symlink_to(place)
        with pytest.raises(ValueError, match="abc/link is a link out of"):
            check_links(snapshot)
        (snapshot / "link").unlink()


def test_evidence_is_copied_from_the_cache_but_not_from_elsewhere(folder, snapshot, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    copy_evidence(snapshot, tmp_path / "one")
    assert (tmp_path / "one" / "samples" / "a.png").read_text() == "{}"
    (folder / "samples" / "x.png").symlink_to(folder.parent / "secret" / "key")
    with pytest.raises(ValueError, match=r"samples/x\.png is a link out of"):
        copy_evidence(folder, tmp_path / "two")
    assert list((tmp_path / "two").iterdir()) == []


def test_the_process_that_uploads_a_run_refuses_a_link_that_was_made_meanwhile(folder):
    (folder / "README.md").symlink_to(folder.parent / "secret" / "key")
    task = {"folder": str(folder), "repo_id": "a/b", "message": "", "ignored": [], "license": None, "token": "hf_no"}
    command = [sys.executable, "-m", "reg_diffusers.hub.background_upload"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    assert done.returncode == 1 and f"{folder}/README.md is a link out of {folder}" in done.stdout
    assert (folder.parent / "secret" / "key").read_text() == "secret"


def test_a_sample_that_is_a_link_elsewhere_is_not_uploaded(folder):
    (folder / "samples" / "000001.png").symlink_to(folder.parent / "secret" / "key")
    store = PictureFolder(folder / "samples")
    with pytest.raises(ValueError, match=r"samples/000001\.png is a link out of"):
        upload_samples("user/samples", store, None, 2, "", None)
