"""Keeps the repositories of a small Hub in memory, with every commit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

LARGE = (".arrow", ".bin", ".jpg", ".parquet", ".png", ".pt", ".safetensors", ".tar", ".zip")


class Refusal(Exception):
    """What the Hub answers instead, by HTTP status, message, and headers."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        plain = message.encode("ascii", "replace").decode()
        headers = {"x_error_message": plain, "x_error_code": code, "x_repo_commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


@dataclass(frozen=True)
class Commit:
    """One state of all files of a repository, by path."""

    oid: str
    title: str
    files: Mapping[str, bytes]


@dataclass
class Repository:
    """One model or data set: its commits, and the names that point to some of them."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self._add("main", "initial commit", {})

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.at("main").files

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a hash means."""
        try:
            return self.commits[self.heads.get(revision, revision)]
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def content(self, revision: str, path: str) -> bytes:
        commit = self.at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.oid)
        return commit.files[path]

    def branch(self, name: str, revision: str = "main") -> None:
        if name in self.heads:
            raise Refusal(409, f"Reference already exists: {name}")
        self.heads[name] = self.at(revision).oid

    def commit(self, branch: str, title: str, added: Mapping[str, bytes], deleted=(), parent: str | None = None):
        """Adds a commit to a branch, and returns it; `deleted` are files, or folders that end with a slash.

        With `parent`, only if no other commit came in between.
        """
        if branch not in self.heads:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if parent and not self.heads[branch].startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.at(branch).files)
        for path in deleted:
            gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        return self._add(branch, title, {**files, **added})

    def tree(self, revision: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """The entries of a folder: the folders, then the files."""
        files = self.at(revision).files
        inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        folders = {parent: None for path in inside for parent in _parents(path) if parent.count("/") >= depth}
        found = [_folder_entry(path) for path in folders] + [file_entry(path, files[path]) for path in inside]
        return [entry for entry in found if recursive or entry["path"].count("/") == depth]

    def entries(self, revision: str, paths: list[str]) -> list[dict]:
        """The entries of those paths that exist."""
        files = self.at(revision).files
        folders = {parent for path in files for parent in _parents(path)}
        return [
            file_entry(path, files[path]) if path in files else _folder_entry(path)
            for path in paths
            if path in files or path in folders
        ]

    def _add(self, branch: str, title: str, files: Mapping[str, bytes]) -> Commit:
        listing = [f"{path} {git_hash(files[path])}" for path in sorted(files)]
        identity = "\n".join([self.id, self.heads.get(branch, ""), title, *listing])
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), title, files)
        self.commits[commit.oid] = commit
        self.heads[branch] = commit.oid
        return commit


def is_large(path: str) -> bool:
    """Whether a file is stored outside of git, by LFS."""
    return path.endswith(LARGE)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    return sha256(content) if is_large(path) else git_hash(content)


def file_entry(path: str, content: bytes) -> dict:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if is_large(path):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]
