"""The file of a case: rows that it has are not computed again, and each new row is written as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["Kept", "OtherSettings"]


class OtherSettings(ValueError):
    """A file has rows of other seeds, or of a training of another length."""


class Kept:
    """The numbers of a case, row by row.

    Args:
        path: file of the case; None: nothing is read or written.
        seeds: of each row.
        length: of the training of a row, in words.
        names: method and weight of all rows, in the order of the table.

    Raises:
        OtherSettings: the file has rows that cannot stand beside new ones.
    """

    def __init__(self, path: Path | None, seeds: Sequence[int], length: str, names: Sequence[tuple[str, float]]):
        self._path, self._names, self._last = path, list(names), time.perf_counter()
        asked = {"seeds": list(seeds), "length": length}
        self.found = {**asked, "seconds": 0, "rows": []}
        if path is None or not path.exists():
            return
        self.found = json.loads(path.read_text())
        for key, value in asked.items():
            if self.found[key] != value:
                raise OtherSettings(
                    f"{path} has rows with {key} {self.found[key]!r}, asked for is {value!r}: choose another --output,"
                    " or delete the file to run all rows again"
                )
        present = {(row["method"], row["weight"]) for row in self.found["rows"]}
        if present and (new := [f"{method} {weight:g}" for method, weight in self.missing]):
            print(f"{path.name}: {len(present)} rows are there, missing: {', '.join(new)}", flush=True)

    @property
    def missing(self) -> list[tuple[str, float]]:
        """Method and weight of the rows that are not in the file."""
        present = {(row["method"], row["weight"]) for row in self.found["rows"]}
        return [name for name in self._names if name not in present]

    def add(self, rows: Iterable[dict]) -> None:
        """Takes rows into the table, with the time since the last ones, and writes the file."""
        self.found["rows"] += rows
        place = {name: index for index, name in enumerate(self._names)}
        self.found["rows"].sort(key=lambda row: place.get((row["method"], row["weight"]), len(place)))
        now = time.perf_counter()
        self.found["seconds"], self._last = self.found["seconds"] + round(now - self._last), now
        if self._path:
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1) + "\n")
            part.replace(self._path)
