"""Numbers that take long to measure, kept on disk as soon as they are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from elc_fx.errors import InvalidInputError
from elc_fx.planning.budget import real_number


class StoredTable(dict[str, float]):
    """Numbers by name. With a folder, each is appended to a file as soon as it is known, and found there again.

    name: of the table, which says what its numbers depend on; another name is another table. Several processes may
    write to one folder. A line that was cut off is left out.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        super().__init__()
        self.file: Path | None = None
        if folder is None:
            return
        with self._problems_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"{name}-*.jsonl")):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    if (entry := _entry(line)) is not None:
                        super().__setitem__(*entry)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.file = folder / f"{name}-{rank}.jsonl"

    def __setitem__(self, key: str, number: float) -> None:
        super().__setitem__(key, number)
        if self.file is not None:
            with self._problems_told(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([key, number])}")

    @staticmethod
    @contextmanager
    def _problems_told(where: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # a ValueError is a name that no file can have
            raise InvalidInputError(f"nothing can be kept in {where}: {error}; give another cache, or none") from error


def _entry(line: str) -> tuple[str, float] | None:
    """What a line says; None where it is damaged."""
    try:
        match json.loads(line):
            case [str(key), int() | float() as number] if real_number(number) >= 0:
                return key, float(number)
    except (ValueError, RecursionError):
        pass
    return None
