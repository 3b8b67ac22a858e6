"""Writing the file of measured configurations: a row at a time, whole at every moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastlora.kernels.cache import FOLDER_VARIABLE
from fastlora.kernels.tuned import FORMAT, Identity, Row, parse

try:
    import fcntl
except ImportError:  # Windows, where Triton is not at home either
    fcntl = None  # type: ignore[assignment]


class TuneFile:
    """The rows of one GPU on disk, shared with other processes that write there.

    Args:
        path (Path): the file; its folder is made.
        identity (Identity): what the rows are for. A file for anything else is replaced by the first row.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path, self.identity = path, identity
        self.replaces = ""
        """Why what is there now is of no use, or an empty string."""
        with self._writable():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass  # a folder that cannot be written is known before the first measurement
        try:
            self.rows: Mapping[str, Row] = self._read()
        except ValueError as error:
            self.rows, self.replaces = {}, str(error)

    def add(self, key: str, row: Row) -> None:
        """Write a row beside those that are there, other processes' rows too.

        Raises:
            OSError: the folder cannot be written.
        """
        with self._writable(), self._locked():
            try:
                rows = dict(self._read())
            except ValueError:
                rows = {}
            rows[key] = row
            self._replace(rows)
            self.rows = rows

    def _read(self) -> dict[str, Row]:
        """What is on disk, nothing where there is no file; ``ValueError`` for one that is of no use."""
        try:
            return parse(self.path.read_text(encoding="utf-8"), self.identity)
        except FileNotFoundError:
            return {}
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def _replace(self, rows: Mapping[str, Row]) -> None:
        content = {
            "format": FORMAT,
            "gpu": dataclasses.asdict(self.identity),
            "rows": {key: dataclasses.asdict(row) for key, row in sorted(rows.items())},
        }
        # In the same folder, so that the name changes hands in one step.
        name = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(name, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:  # an interrupt as well
            with contextlib.suppress(OSError):
                name.unlink()
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process reads and replaces meanwhile, where the file system has locks."""
        with open(self.path.with_suffix(".lock"), "w") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write to {self.path.parent}: {error.strerror or error}; let {FOLDER_VARIABLE} name "
                "a folder that can be written"
            ) from error


def clear(path: Path) -> bool:
    """Remove a GPU's file, and what a killed process may have left beside it; whether it was there."""
    there = path.exists()
    for left in (path, *path.parent.glob(f"{path.name}.*.tmp")):
        left.unlink(missing_ok=True)
    return there
