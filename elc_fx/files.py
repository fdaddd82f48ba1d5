"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Writes each beside its file; when all are on the disk, renames them. A failure leaves the old files.

    Contents are bytes: writers of torch and safetensors that run into a full disk abort, or raise errors of their own.
    Raises `OSError`.
    """
    unfinished = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in contents}
    try:
        for file, content in contents.items():
            with unfinished[file].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for file, beside in unfinished.items():
            beside.replace(file)
    finally:
        for beside in unfinished.values():
            beside.unlink(missing_ok=True)
