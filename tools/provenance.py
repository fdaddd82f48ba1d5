"""Where a measured number comes from: date, command, machine, versions. Every result file starts with it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "openvino", "torch-pruning", "torchao", "elc_fx")


@dataclass(frozen=True)
class Machine:
    """The hardware, as far as it bears on a measurement. memory_gib is installed RAM; load is the 1-minute average."""

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    gpu: str | None
    load: float
    system: str


@dataclass(frozen=True)
class Provenance:
    """One run of one tool. `commit` is None before a first commit; `modified`: elc_fx or tools differ from it."""

    date: str
    command: str
    machine: Machine
    versions: dict[str, str | None]
    commit: str | None
    modified: bool


def collect() -> Provenance:
    """Describes this process; call it when the tool starts, so that date and load are those of the measurement."""
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=_command(),
        machine=_machine(),
        versions={"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        commit=_git("rev-parse", "--verify", "HEAD"),
        modified=bool(_git("status", "--porcelain", "--", "elc_fx", "tools")),
    )


def store(path: Path, provenance: Provenance, result: dict[str, Any]) -> None:
    """Writes the result, headed by its provenance, as JSON. Raises ValueError on NaN or infinity: use None."""
    text = json.dumps({"provenance": asdict(provenance), **result}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"stored {path}", file=sys.stderr)


def describe(provenance: dict[str, Any]) -> str:
    """One sentence for the foot of a table, from a stored provenance."""
    machine, versions = provenance["machine"], provenance["versions"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    commit = provenance["commit"][:10] if provenance["commit"] else "uncommitted files"
    cores = f"{machine['cores']} cores ({machine['threads']} threads)"
    return (
        f"{provenance['date'][:10]}, {machine['cpu']}, {cores}, {machine['memory_gib']:.0f} GiB{gpu}; "
        f"torch {versions['torch']}, torchvision {versions['torchvision']}, elc_fx at {commit}"
        f"{' with local changes' if provenance['modified'] and provenance['commit'] else ''}. `{provenance['command']}`"
    )


def describe_all(provenances: Sequence[dict[str, Any]]) -> str:
    """The same for a table of rows that were measured apart."""
    dates = sorted(own["date"][:10] for own in provenances)
    processors = Counter(own["machine"]["cpu"] for own in provenances)
    versions = sorted({f"torch {own['versions']['torch']}" for own in provenances})
    return f"{dates[0]} to {dates[-1]}; {', '.join(cpu for cpu, _ in processors.most_common())}; {', '.join(versions)}"


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def _machine() -> Machine:
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        load=round(os.getloadavg()[0], 2),
        system=platform.platform(),
    )


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of git in this repository; None where git, the repository or a first commit is missing."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
