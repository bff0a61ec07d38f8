"""Files that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the place, then rename, so that a kill leaves the old file or the new one.

    Creates the folder. A new file gets the mode that the umask leaves, a replaced one keeps its
    mode.

    Raises:
        OSError: The file cannot be written; what was there stays.
    """
    if path.exists() and not path.is_file():  # a device or a pipe, which stays one; or a folder
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
