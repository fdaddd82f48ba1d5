"""Files that are written whole or not at all, and folders in which one process works at a time."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from elc_fx.errors import TrainingError, warn

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none
PATIENCE = 10.0  # seconds; the workers of a data loader may live some seconds longer than a run that was killed


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Writes each beside its file; when all are on the disk, renames them. A failure leaves the old files.

    Contents are bytes: writers of torch and safetensors that run into a full disk abort, or raise errors of their own.
    Links stay links, and a file that was there keeps its permissions. Raises `OSError`.
    """
    files = {_real(file): content for file, content in contents.items()}
    unfinished = {file: file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp") for file in files}
    try:
        for file, content in files.items():
            with unfinished[file].open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if file.exists():
                shutil.copymode(file, unfinished[file])
        for file, beside in unfinished.items():
            beside.replace(file)
    finally:
        for beside in unfinished.values():
            beside.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes it, if it is not there. Raises `OSError` where nothing can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _real(file: Path) -> Path:
    try:
        return file.resolve()
    except RuntimeError as error:  # what Python before 3.13 has for links that lead to each other
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(file)) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it; the system lets go of it when a process dies.

    Raises `TrainingError` where another run is in it, and `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=PATIENCE, is_singleton=True)  # so that one run may enter it twice
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(f"another run is at work in {folder}; wait for it, or give another folder") from None
    except (OSError, NotImplementedError) as error:  # the latter where Python has no locks
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        warn(f"{folder} cannot be locked ({error}): let no other run work in it")
    try:
        yield
    finally:
        lock.release()
