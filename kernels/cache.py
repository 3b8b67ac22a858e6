"""Where fastlora keeps what it makes on a machine: measured configurations, and `replay.cpp` compiled."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "FASTLORA_CACHE_DIR"


def cache_folder() -> Path:
    """``$FASTLORA_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastlora``, else ``~/.cache/fastlora``.

    Raises:
        RuntimeError: none of the two is set, and there is no home folder.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastlora"
