"""A record of the origins of results, stored beside them, so that a later run recognises its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORD = "results.jsonl"
# What a setting that is not in the record was.
_NOT_RECORDED = {"format": "png or coco"}


@dataclass(frozen=True)
class Origin:
    """The origin of a result: an image file and settings.

    Attributes:
        file: name of the image, for people; images of the same bytes are the same.
        sha256: hash of the image file.
        settings: model and options that change results; ``command`` if it was not ``auto``.
    """

    file: str
    sha256: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, path: Path, settings: dict[str, Any]) -> Origin:
        """Return the origin of a result of the image file ``path``, which is hashed."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return cls(path.name, digest.hexdigest(), settings)

    @property
    def command(self) -> str:
        return str(self.settings.get("command", "auto"))

    def difference(self, other: Origin | None) -> str | None:
        """Describe how origin ``other`` differs from this one; None if it does not."""
        if other is None:
            return f"is not in {RECORD}, which says what results were made from"
        if other.command != self.command:
            return f"was made by {other.command}"
        if other.sha256 != self.sha256:
            return f"was made from another file, {other.file}"
        names = sorted({*self.settings, *other.settings})
        changed = [name for name in names if self.settings.get(name) != other.settings.get(name)]
        if changed:
            before, after = (
                {name: origin.settings.get(name, _NOT_RECORDED.get(name)) for name in changed}
                for origin in (other, self)
            )
            return f"was made with other settings: {_listed(before)}, now {_listed(after)}"
        return None


class Record:
    """The origins of the results in a folder, one line of JSON per result; the last line of a name counts.

    Attributes:
        path: file of the record.
        damaged: number of lines that cannot be read, for example cut off when a run was killed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        self.damaged = 0
        self._origins: dict[str, Origin] = {}
        self._cut_off = False
        if self.path.is_file():
            data = self.path.read_bytes()
            self._cut_off = bool(data) and not data.endswith(b"\n")
            for line in filter(bytes.strip, data.splitlines()):
                try:
                    self._read(json.loads(line.decode("utf-8")))
                except (ValueError, TypeError, KeyError, RecursionError):
                    self.damaged += 1

    def _read(self, entry: dict[str, Any]) -> None:
        if isinstance(entry, dict) and entry.keys() == {"result"}:
            self._origins.pop(entry["result"], None)
            return
        origin = Origin(entry["file"], entry["sha256"], entry["settings"])
        if not isinstance(origin.settings, dict):
            raise TypeError("settings must be an object")
        self._origins[entry["result"]] = origin

    def get(self, result: str) -> Origin | None:
        """Return the origin of a result, None if it is not in the record."""
        return self._origins.get(result)

    def check(self, path: Path, origin: Origin) -> None:
        """Check that a result may be replaced by one of ``origin``, or is not there.

        Raises:
            ValueError: it has another origin, or none in the record.
        """
        difference = origin.difference(self.get(path.name)) if path.exists() else None
        if difference is not None:
            raise ValueError(f"{path} {difference}; --force replaces it, another --out keeps it")

    def results_of(self, file: str, command: str) -> list[str]:
        """List the results that ``command`` made from images of this name."""
        return [result for result, origin in self._origins.items() if origin.file == file and origin.command == command]

    def add(self, results: Iterable[str], origin: Origin) -> None:
        """Record results before they appear under their names, so that no result ever has a wrong origin."""
        self._write([{"result": result, **asdict(origin)} for result in results])
        self._origins.update(dict.fromkeys(results, origin))

    def forget(self, result: str) -> None:
        """Record that a result is removed, so that a later file of its name is not taken for it."""
        self._write([{"result": result}])
        self._origins.pop(result, None)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self._cut_off + "".join(json.dumps(entry) + "\n" for entry in entries))
        self._cut_off = False


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
