"""What a result depends on besides the program's arguments: versions, commit, machine, limits set on it."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("subspec", "torch", "transformers")
_CGROUPS = Path("/sys/fs/cgroup")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the result."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """``git describe`` of the checkout this package runs from; ``None`` for an installed copy."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # A virtual environment may lie inside somebody else's checkout: this very file must be tracked.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name],
            check=True,
            capture_output=True,
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--tags"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Processor, threads, memory and its limits, kernels in use, disk throttle."""
    import torch

    from subspec.kernels.native import kernels
    from subspec.memory.tiers import memory_limits

    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory": memory_limits(),
        "kernels": kernels().level,
        "disk_throttle": disk_throttle(),
    }


def provenance(command: str) -> dict[str, Any]:
    """What every result file begins with: the command, the commit, the versions and the machine."""
    return {"command": command, "commit": commit(), "versions": versions(), "machine": machine()}


def processor() -> str:
    """The processor's name as it gives it itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def disk_throttle(
    cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")
) -> list[dict[str, Any]]:
    """Limits on this process's reads from disk, set on its control group or on one above it.

    Returns:
        One ``{"device": "8:0", "read_bytes_per_s": N, "group": "/path"}`` per limit; empty if there is none.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "blkio" in controllers.split(","):
            root, name = cgroups / "blkio", "blkio.throttle.read_bps_device"
        elif not controllers:
            root, name = cgroups, "io.max"
        else:
            continue
        for directory in _upwards(root, group):
            found += [{**limit, "group": group} for limit in _read_limits(directory / name)]
    return found


def _upwards(root: Path, group: str) -> list[Path]:
    """The directory of a group and of every group above it, down to the root's."""
    path = root / group.strip("/")
    return [path, *(parent for parent in path.parents if parent.is_relative_to(root))]


def _read_limits(path: Path) -> list[dict[str, Any]]:
    """The limits in one file: ``8:0 1000`` (v1) or ``8:0 rbps=1000 wbps=max`` (v2) a line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        device, *values = line.split()
        speeds = [
            value.removeprefix("rbps=") for value in values if "=" not in value or value.startswith("rbps=")
        ]
        limits += [{"device": device, "read_bytes_per_s": int(speed)} for speed in speeds if speed.isdigit()]
    return limits
