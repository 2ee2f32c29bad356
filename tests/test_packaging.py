"""What the package says about itself: metadata, citation, types, image, workflow."""

import ast
import configparser
import re
import runpy
from pathlib import Path

import pytest
import yaml

import reg_diffusers

pytestmark = pytest.mark.project

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["metadata"]


def test_editors_know_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "reg_diffusers" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    known = {alias.name: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert known == reg_diffusers._HOME
    assert (ROOT / "reg_diffusers" / "py.typed").is_file()


def test_one_address_is_given_everywhere(metadata):
    address = metadata["url"]
    readme = (ROOT / "README.md").read_text()
    assert f"git clone {address} && cd reg_diffusers" in readme and f"url = {{{address}}}" in readme
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address
    assert all(line.split(" = ")[1].startswith(address) for line in metadata["project_urls"].strip().splitlines())
    text = (ROOT / "CONTRIBUTING.md").read_text()
    placeholder, files = re.search(r"`sed -i 's\|(.*)\|.*\|' (.*?)`", text).groups()
    holders = {path.name for path in ROOT.iterdir() if path.is_file() and placeholder in path.read_text()}
    filled = set(files.split()) if placeholder in address else set()
    assert holders == filled | {"CONTRIBUTING.md"}


def test_the_citation_has_what_its_format_requires(metadata):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == metadata["license"]
    assert citation["authors"] == [{"name": metadata["author"]}]


def test_the_image_takes_the_versions_of_the_constraints():
    text = (ROOT / "docs" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    chosen, left_out = re.findall(r'grep -v?iE "(.*?)" constraints.txt', text)
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    torch = [line for line in lines if re.search(chosen, line, re.IGNORECASE)]
    assert len(torch) == 1 and torch[0].startswith("torch==")
    others = [line for line in lines if not re.search(left_out, line, re.IGNORECASE)]
    assert set(lines) - set(others) == set(torch)


def test_the_image_installs_what_the_package_has():
    text, setup = (ROOT / "docs" / "Dockerfile").read_text(), configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(re.search(r'"\.\[(.*?)\]"$', text, re.MULTILINE)[1].split(",")) <= set(setup["options.extras_require"])
    assert (
        re.search(r'^ENTRYPOINT \["(.*?)"\]$', text, re.MULTILINE)[1]
        in setup["options.entry_points"]["console_scripts"]
    )
    assert (
        f"Python :: {re.search(r'^FROM python:([0-9.]+)-slim$', text, re.MULTILINE)[1]}"
        in setup["metadata"]["classifiers"]
    )
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    assert {f"{module}.py" for module in setup["options"]["py_modules"].split()} <= set(copied)
    assert "reg_diffusers" in copied and set(setup["metadata"]["license_files"].split()) - {*copied} == {
        "reg_diffusers/data/LICENSE.fashion-mnist"
    }


def test_the_workflow_runs_the_checks_of_this_repository():
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / "github.yml").read_text())
    steps = workflow["jobs"]["checks"]["steps"]
    (command,) = (step["run"] for step in steps if "run" in step)
    assert (ROOT / command).is_file()


def test_the_description_for_an_index_has_no_relative_links(metadata):
    absolute = runpy.run_path(str(ROOT / "setup.py"))["with_absolute_links"]
    readme, address = (ROOT / "README.md").read_text(), metadata["url"]
    text = absolute(readme, address)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and all(path.startswith("https://") for _, path in links)
    own = [(mark, path.removeprefix(address)) for mark, path in links if path.startswith(address)]
    assert {path.split("/")[1] for mark, path in own if mark} == {"raw"}
    assert [path for _, path in own if not (ROOT / path.split("/main/")[1]).exists()] == []
    assert absolute("[a](#b) ![c](https://d/e.png) [f](g.md)", "https://h") == (
        "[a](#b) ![c](https://d/e.png) [f](https://h/blob/main/g.md)"
    )
    assert "file:" not in metadata.get("long_description", "")  # setup.py writes it
