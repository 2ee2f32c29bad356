"""Lists a local folder of images: the files to use, the class of each, and the skipped files with the reasons.

File names never make a file part of a split. Only if all images lie in top-level folders such as train/ and test/, one
split is used. Every skipped image file is counted.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..runtime.errors import UsageError
from .pictures import extensions
from .source import Source

__all__ = ["ImageFolder", "list_images"]

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TABLES = (".parquet", ".arrow", ".tar")
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
# Image types that are not read, or not by every version of Pillow: counted, never skipped silently.
_OTHER_IMAGES = frozenset(
    ".avif .avifs .webp .jp2 .j2k .jpc .jpf .jpx .j2c .qoi .heic .heif .hif .jxl .jxr .svg .psd .xcf .eps .ps"
    " .dds .exr .hdr .icns .cur .blp .fits .fit"
    " .wmf .emf .fli .flc .ras .pcd .msp .xpm .im .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
)
_HIDDEN = ("are hidden or in a hidden folder", "")
_REASONS = _EXAMPLES = 5
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"qoif")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"hevc")


@dataclass(frozen=True)
class ImageFolder:
    """The content of a folder of images.

    Attributes:
        root: the folder, absolute.
        files: the images to use, sorted by path; those in archives as "zip://a.png::/photos/a.zip".
        left_out: the skipped image files, each with the reason: a text, and an example for its "%s", or "".
        metadata: the files that list images with their columns, also in archives.
        tables: the number of tables in the folder.
        fingerprint: a hash of names, sizes and modification times.
    """

    root: str
    files: list[str]
    left_out: dict[str, tuple[str, str]]
    metadata: list[str]
    tables: int
    fingerprint: str

    def classes(self) -> list[str]:
        """Returns the class of each image: the name of its folder.

        Raises:
            ValueError: if the folders do not define classes; the message is the reason.
        """
        places = [_inside(file, self.root).split("/")[:-1] for file in self.files]
        depths = {len(place): file for place, file in zip(places, self.files, strict=True)}
        if 0 in depths:
            raise ValueError(f"{depths[0]} is in no class folder: put each class into its own subfolder")
        if len(depths) > 1:
            shallow, deep = depths[min(depths)], depths[max(depths)]
            raise ValueError(f"class folders are nested, {deep} lies deeper than {shallow}: put all into one folder")
        names = [place[-1] for place in places]
        if len(set(names)) < 2:
            raise ValueError(f"all images are in one folder, {names[0]}: put each class into its own subfolder")
        return names

    def check_any(self, source: Source) -> None:
        """Raises UsageError if the folder holds no usable image and no metadata that name one."""
        if not self.files and not self.metadata:
            line = self.unused()
            raise UsageError(f"{source.flag}: holds no images{' that are used: ' if line else ''}{line}")

    def unused(self, used: set[str] | None = None) -> str:
        """Reports in one line how many image files are not used, and why; "" if all are used.

        Args:
            used: the images that the metadata name; `files` by default.
        """
        left = [reason for file, reason in self.left_out.items() if used is None or file not in used]
        if used is not None:
            name = self.metadata[0].split("::")[0].split("/")[-1]
            left += [("are in no row of %s (add rows for them)", name) for file in self.files if file not in used]
        if not left:
            return ""
        counts = Counter(text for text, _ in left)
        reasons = ", ".join(
            _shown(text, {example for other, example in left if other == text})
            + (f": {count:,}" if len(counts) > 1 else "")
            for text, count in counts.most_common(_REASONS)
        )
        more = f" and others: {len(left) - sum(n for _, n in counts.most_common(_REASONS)):,}"
        return (
            f"{len(left):,} of {len(self.files) + len(self.left_out):,} image files are not used, because they"
            f" {reasons}{more if len(counts) > _REASONS else ''}"
        )


def list_images(
    folder: str, source: Source, excluded: Callable[[str, bool], str | None] = lambda path, is_folder: None
) -> ImageFolder:
    """Lists a folder with its subfolders; follows links to folders inside it.

    Args:
        folder: the folder to list.
        source: the source with the folder as its root.
        excluded: called with the absolute path of each subfolder and file, and whether it is a folder; returns the
            reason why images there are no data ("are in run/, which a training wrote"), or None. Such images are
            counted, but not used.

    Raises:
        UsageError: if a folder or archive cannot be read, for links out of the folder or nested links to folders, and
            for several splits without train/.
    """
    walk = _Walk(os.path.abspath(folder), source, excluded)
    walk.run()
    return walk.found()


@dataclass(frozen=True)
class _Folder:
    """A folder to list.

    Attributes:
        path: its path, with links.
        real: the real paths of all folders from the root to this one; a link back to one of them is a cycle.
        reason: the reason why its content is not used, or None.
        is_linked: whether the path contains a link.
    """

    path: str
    real: tuple[str, ...]
    reason: tuple[str, str] | None = None
    is_linked: bool = False


class _Walk:
    """One pass over a folder."""

    def __init__(self, root: str, source: Source, excluded: Callable[[str, bool], str | None]):
        self._root, self._source, self._excluded = root, source, excluded
        self._readable = extensions()
        self._files: list[str] = []
        self._left_out: dict[str, tuple[str, str]] = {}
        self._metadata: list[str] = []
        self._archives: list[str] = []
        self._outside: list[str] = []  # links to folders elsewhere
        self._tables = 0
        self._hash = hashlib.sha256()

    def run(self) -> None:
        pending = [_Folder(self._root, (os.path.realpath(self._root),))]
        while pending:
            folder = pending.pop()
            for entry in self._entries(folder):
                if _is_folder(entry):
                    pending += self._subfolder(entry, folder)
                else:
                    self._file(entry, folder.reason)

    def found(self) -> ImageFolder:
        """Returns the result, with the images of one split if there are splits."""
        if self._outside and not self._metadata:  # with metadata, each path in them is checked instead
            self._source.check(self._outside[0])
        for archive in sorted(self._archives):
            self._read_archive(archive)
        split = self._split()
        used = [file for file in self._files if file not in self._left_out]
        return ImageFolder(
            self._root,
            sorted(used, key=lambda file: (file.startswith("zip://"), file)),
            self._left_out,
            sorted(path for path in self._metadata if split(path)),
            self._tables,
            self._hash.hexdigest(),
        )

    def _entries(self, folder: _Folder) -> list[os.DirEntry]:
        try:
            with os.scandir(folder.path) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if folder.reason is not None:  # not used anyway
                return []
            raise UsageError(f"{self._source.flag}: {folder.path} cannot be read: {error.strerror}") from error

    def _subfolder(self, entry: os.DirEntry, parent: _Folder) -> Iterator[_Folder]:
        is_link, reason = entry.is_symlink(), parent.reason
        if reason is None and entry.name.startswith((".", "__")):
            reason = _HIDDEN
        if reason is None and (why := self._excluded(entry.path, True)):
            reason = (why, "")
        real = os.path.realpath(entry.path) if is_link else os.path.join(parent.real[-1], entry.name)
        if is_link and any(
            folder == real or folder.startswith(real.rstrip(os.sep) + os.sep) for folder in parent.real
        ):
            return  # a cycle: its content is listed already
        if is_link and not self._source.holds(entry.path):
            if reason is None:
                self._outside.append(entry.path)
            return
        if is_link and parent.is_linked:  # such links could multiply without end
            if reason is None:
                raise UsageError(
                    f"{self._source.flag}: {entry.path} is a link in a linked folder, and nested links are not"
                    " followed: put the folder itself there, or remove the link"
                )
            return
        yield _Folder(entry.path, (*parent.real, real), reason, parent.is_linked or is_link)

    def _file(self, entry: os.DirEntry, reason: tuple[str, str] | None) -> None:
        name, path = entry.name.lower(), entry.path
        if reason is None and entry.name.startswith("."):
            reason = _HIDDEN
        reason = reason or self._excluded(path, False)
        extension = os.path.splitext(name)[1]
        if reason is None and (extension == ".zip" or entry.name in _METADATA):
            self._checked(entry)
            (self._archives if extension == ".zip" else self._metadata).append(path)
        elif extension in self._readable or extension in _OTHER_IMAGES or self._is_image(entry, name, reason):
            reason = reason or self._kind_reason(name)
            if reason is None:
                self._checked(entry)
                self._files.append(path)
            else:
                self._left_out[path] = reason
        elif reason is None and extension in _TABLES:
            self._tables += 1

    def _checked(self, entry: os.DirEntry) -> None:
        """Checks the location of a file, and adds its size and modification time to the fingerprint."""
        if entry.is_symlink():
            self._source.check(entry.path)
        try:
            state = entry.stat()
            identity = (entry.path, state.st_size, state.st_mtime_ns)
        except OSError:  # a dangling link, which decoding reports
            identity = (entry.path,)
        self._hash.update(repr(identity).encode())

    def _is_image(self, entry: os.DirEntry, name: str, reason: tuple[str, str] | None) -> bool:
        """Whether a file without an image extension is an image: by its content, or by a name such as "a.png.gz"."""
        base, extension = os.path.splitext(name)
        if extension in _COMPRESSED and os.path.splitext(base)[1] in self._readable:
            return True
        try:
            if reason is not None or not entry.is_file(follow_symlinks=False):  # reading a pipe would block
                return False
            with open(entry.path, "rb") as file:
                start = file.read(16)
        except OSError:
            return False
        is_webp = start.startswith(b"RIFF") and start[8:12] == b"WEBP"
        return start.startswith(_BEGINNINGS) or is_webp or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)

    def _kind_reason(self, name: str) -> tuple[str, str] | None:
        base, extension = os.path.splitext(name)
        if not name.isascii() and any(
            "\ud800" <= character <= "\udfff" for character in name
        ):  # bytes that Python could not decode
            return ("have names that are not UTF-8 (rename them)", "")
        if extension in self._readable:
            return None
        if extension in _OTHER_IMAGES:
            return ("are of an unsupported format (%s; convert them to PNG or JPEG)", extension)
        if extension in _COMPRESSED and os.path.splitext(base)[1] in self._readable:
            return ("are compressed (%s; unpack them)", extension)
        return ("have no image extension (%s; rename them)", extension or "none")

    def _read_archive(self, path: str) -> None:
        try:
            self._source.check_files([path])
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(f"{self._source.flag}: {path} cannot be read: {error}") from error
        for member in members:
            parts = member.lower().split("/")
            extension = os.path.splitext(parts[-1])[1]
            file = f"zip://{member}::{path}"
            is_hidden = any(part.startswith((".", "__")) for part in parts)
            reason = _HIDDEN if is_hidden else self._kind_reason(parts[-1])
            if extension in self._readable or extension in _OTHER_IMAGES:
                self._files.append(file)
                if reason is not None:
                    self._left_out[file] = reason
            elif parts[-1] in _METADATA and not is_hidden:
                self._metadata.append(file)

    def _split(self) -> Callable[[str], bool]:
        """Skips the other splits if there are several; returns a function that tells whether a path is used."""

        def top(path: str) -> str:
            return _inside(path, self._root).split("/")[0]

        images = [file for file in self._files if file not in self._left_out]
        tops = {top(path) for path in (*images, *self._metadata)}
        splits = {name: split for split, names in _SPLITS.items() for name in tops if name.lower() in names}
        if not tops or len(splits) < len(tops) or len(set(splits.values())) == 1:
            return lambda path: True
        if "train" not in splits.values():
            such = sorted(tops)
            raise UsageError(
                f"{self._source.flag}: holds the splits {', '.join(such)}, but no train: name one of them, such as"
                f" {os.path.join(self._root, such[0])}"
            )
        chosen = {name for name, split in splits.items() if split == "train"}
        others = sorted(tops - chosen)
        unused, used = (", ".join(f"{name}/" for name in names) for names in (others, sorted(chosen)))
        another = os.path.join(self._root, others[0])
        reason = (
            f"are in {unused} (only {used} is used; to use another split, name it, such as {another})",
            "",
        )
        self._left_out.update(dict.fromkeys((file for file in images if top(file) not in chosen), reason))
        return lambda path: top(path) in chosen


def _shown(text: str, examples: set[str]) -> str:
    """Fills a few examples into a reason."""
    rest = ["..."] if len(examples) > _EXAMPLES else []
    shown = [*(ascii(example)[1:-1] for example in sorted(examples)[:_EXAMPLES]), *rest]
    return text.replace("%s", ", ".join(shown)) if examples != {""} else text


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _inside(path: str, root: str) -> str:
    """Returns the path below the root; the members of an archive count as files of the archive's folder."""
    if path.startswith("zip://"):
        member, archive = path.removeprefix("zip://").rsplit("::", 1)
        path = os.path.join(os.path.dirname(archive), member)
    return path.removeprefix(root).replace(os.sep, "/").lstrip("/")
