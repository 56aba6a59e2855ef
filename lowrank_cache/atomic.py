"""Files that are written whole or not at all: a full disk or a crash leaves what was there before."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["write_files"]


def write_files(contents: Mapping[Path, bytes | Callable[[Path], object]]) -> None:
    """Write several files that belong together; if one cannot be written, all stay as they were.

    Each is written under another name in its folder and brought to disk; only when all are there are they renamed,
    in the order given, which takes no room. A process that is killed may leave files named ``.NAME.*``, which nothing
    reads; one that is killed between two renames leaves files that do not belong together, so one of them should
    hold a digest of the others.

    Args:
        contents: What each path shall hold: bytes, or a function that writes to the path it is given.

    Raises:
        OSError: If there is no room or no permission; nothing has changed then.
    """
    temporary: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            descriptor, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(descriptor)
            if callable(content):
                content(Path(temporary[path]))
            else:
                Path(temporary[path]).write_bytes(content)
            with open(temporary[path], "rb+") as file:
                os.fsync(file.fileno())  # where a full disk shows at the latest
            os.chmod(temporary[path], 0o644)
        for path in contents:
            os.replace(temporary[path], path)
            del temporary[path]
    finally:
        for name in temporary.values():
            Path(name).unlink(missing_ok=True)
