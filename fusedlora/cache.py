"""Where fusedlora keeps what it has found out or built for this user."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory for fusedlora; not created here."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusedlora"
