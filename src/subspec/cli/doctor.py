"""``subspec doctor``: what this machine offers, which fast paths are in use, and why others are not."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from subspec.cli.progress import TerminalProgress
from subspec.errors import OptionError

PROBE_BYTES = 256 << 20
_FREE_AFTER_PROBE_BYTES = 1 << 30
_FEATURES = (
    "avx2",
    "bmi2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_vbmi2",
    "amx_bf16",
    "amx_int8",
)
_SHAPES = ((2048, 2048), (896, 4864), (4864, 896), (8192, 1536))

Store = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Place to examine.  [default: the user's cache]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def doctor(store: Store = None, as_json: Json = False) -> None:
    """Examine the machine: versions, processor, GPU, kernels, disk, memory and its limits, free space."""
    from subspec.memory.disk import cache_directory

    with TerminalProgress() as progress:
        findings = examine(store or cache_directory(), progress)
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        _print(findings)


def examine(store: Path, progress: TerminalProgress) -> dict[str, Any]:
    """All findings, as ``--json`` prints them."""
    import torch

    from subspec.bench import machine
    from subspec.bench.device import examine_device
    from subspec.kernels.native import cpu_features, kernels
    from subspec.memory import hazards
    from subspec.memory.tiers import memory_limits

    found = kernels()
    features = cpu_features()
    findings: dict[str, Any] = {
        "versions": machine.versions(),
        "cpu": {
            "name": machine.processor(),
            "threads": torch.get_num_threads(),
            "features": [name for name in _FEATURES if name in features],
        },
        "kernels": {"level": found.level, "missing": found.missing},
        "exact_product": _exact_products(progress),
        "gpu": examine_device(_SHAPES),
        "hazard_checks": hazards.wanted(),
        "memory": memory_limits(),
        "disk": _disk(store, progress),
    }
    return {**findings, "warnings": _warnings(findings)}


def _exact_products(progress: TerminalProgress) -> dict[str, str]:
    """How each precision's exact product is computed so that a row's bits do not depend on the other rows.

    Tried on shapes of usual models; a run tries its own model's.
    """
    import torch

    from subspec.errors import ModelError
    from subspec.models.linear import choose_product

    scratch = torch.empty(max(n * k for n, k in _SHAPES) * 4, dtype=torch.uint8)
    ways = {}
    for done, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        progress("checking products", done, 3)
        try:
            ways[str(dtype).removeprefix("torch.")] = choose_product(_SHAPES, dtype, scratch).name
        except ModelError as error:
            ways[str(dtype).removeprefix("torch.")] = f"none: {error}"
    progress("checking products", 3, 3)
    return ways


def _warnings(findings: dict[str, Any]) -> list[str]:
    """What makes runs here slower, or larger, than they need be."""
    disk, memory = findings["disk"], findings["memory"]
    found = [
        f"kernels for {level} are not in use: {why}" for level, why in findings["kernels"]["missing"].items()
    ]
    if forced := os.environ.get("SUBSPEC_KERNELS"):
        found.append(f"SUBSPEC_KERNELS={forced} decides on the kernels")
    elif findings["kernels"]["level"] == "reference":
        found.append("no native kernels: everything runs on slow reference functions, and weights stream raw")
    if findings["hazard_checks"]:
        found.append("SUBSPEC_HAZARDS checks the order of every access: runs are slower")
    found += [f"{dtype}: {way}" for dtype, way in findings["exact_product"].items() if way.startswith("none")]
    if not disk["direct_reads"]:
        found.append(f"direct reads do not work at {disk['store']}: {disk['direct_reads_failure']}")
    if disk["read_bytes_per_s"] is None:
        found.append(f"the disk was not measured: {disk['free_bytes']} bytes free are too few for a probe")
    for limit in disk["throttle"]:
        speed = limit["read_bytes_per_s"] / 1e9
        found.append(f"a control group limits reads of device {limit['device']} to {speed:.2f} GB/s")
    if memory["cgroup_limit_bytes"] is not None:
        found.append(
            f"a control group limits memory, page cache included, to {memory['cgroup_limit_bytes']} bytes"
        )
    return found


def _print(findings: dict[str, Any]) -> None:
    """The findings for people."""
    from subspec.memory.tiers import format_size

    def size(value: int | None) -> str:
        return "none" if value is None else format_size(value)

    cpu, disk, memory = findings["cpu"], findings["disk"], findings["memory"]
    speed = disk["read_bytes_per_s"]
    best = f"threads: {disk['read_threads']}, requests of {size(disk['read_request_bytes'])}"
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in findings["versions"].items()),
        "processor": f"{cpu['name']}, {cpu['threads']} threads",
        "features": " ".join(cpu["features"]) or "none of interest",
        "kernels": findings["kernels"]["level"],
        "products": ", ".join(f"{dtype}: {way}" for dtype, way in findings["exact_product"].items()),
        "gpu": _gpu(findings["gpu"]),
        "hazards": "checked in every run" if findings["hazard_checks"] else "not checked",
        "memory": f"{size(memory['total_bytes'])}, {size(memory['available_bytes'])} available",
        "group limit": size(memory["cgroup_limit_bytes"]),
        "store": f"{disk['store']}, {size(disk['free_bytes'])} free",
        "direct reads": "yes" if disk["direct_reads"] else f"no: {disk['direct_reads_failure']}",
        "disk": f"{speed / 1e9:.2f} GB/s ({best})" if speed else "not measured",
    }
    for name, text in rows.items():
        print(f"{name:<13} {text}")
    for warning in findings["warnings"]:
        print(f"{'warning':<13} {warning}")


def _gpu(found: dict[str, Any]) -> str:
    """The CUDA device in a line."""
    if found["device"] is None:
        return f"none: {found['why_none']}"
    if not found["usable"]:
        return f"{found['device']}: too old for the kernels"
    best = {
        way: max(one["bytes_per_s"] for one in found["link"] if one["way"] == way) for way in ("h2d", "d2h")
    }
    speeds = f"{best['h2d'] / 1e9:.1f} GB/s to it, {best['d2h'] / 1e9:.1f} from it"
    return f"{found['device']}; {speeds}; draft products: {found['draft_product']['name']}"


def _disk(store: Path, progress: TerminalProgress) -> dict[str, Any]:
    """Space, direct reads and their speed at the store's place.

    Raises:
        OptionError: no existing directory leads to the store, or nothing can be written there.
    """
    from subspec.bench.machine import disk_throttle
    from subspec.memory.disk import direct_reads

    place = next((path for path in (store, *store.absolute().parents) if path.is_dir()), None)
    if place is None or not os.access(place, os.W_OK):
        raise OptionError(f"{store} is no place for a store: {place or store} is not a writable directory")
    works, reason = direct_reads(place)
    measurements = _measure(store, place, progress)
    best = next((one for one in measurements if one["lasting"]), None)
    return {
        "store": str(store),
        "free_bytes": shutil.disk_usage(place).free,
        "direct_reads": works,
        "direct_reads_failure": None if works else reason,
        "read_bytes_per_s": best["bytes_per_s"] if best else None,
        "read_threads": best["threads"] if best else None,
        "read_request_bytes": best["request_bytes"] if best else None,
        "measurements": measurements,
        "throttle": disk_throttle(),
    }


def _measure(store: Path, place: Path, progress: TerminalProgress) -> list[dict[str, Any]]:
    """Read speeds of a prepared model's files or, where there is none, of a file made for it and removed.

    The last is the lasting speed of the best candidate: of nine short reads the fastest is the luckiest.
    """
    from subspec.bench.link import CANDIDATES, LinkMeter

    with _something_to_read(store, place) as directory:
        if directory is None:
            return []
        meter = LinkMeter(directory, bytes_each=PROBE_BYTES // 2, settle_s=0.0)
        for done in range(len(CANDIDATES)):
            progress("measuring the disk", done, len(CANDIDATES))
            meter.measure(1)
        meter.measure_lasting(1)
        progress("measuring the disk", len(CANDIDATES), len(CANDIDATES))
        return meter.measurements


@contextlib.contextmanager
def _something_to_read(store: Path, place: Path) -> Iterator[Path | None]:
    """A directory with at least ``PROBE_BYTES`` of large files; ``None`` if the disk has no room for one."""
    from subspec.bench.link import image_files

    if store.is_dir() and sum(path.stat().st_size for path in image_files(store)) >= PROBE_BYTES:
        yield store
    elif shutil.disk_usage(place).free < PROBE_BYTES + _FREE_AFTER_PROBE_BYTES:
        yield None
    else:
        with tempfile.TemporaryDirectory(dir=place, prefix=".subspec-doctor-") as name:
            with (Path(name) / "probe.exact").open("wb") as file:
                block = os.urandom(1 << 20)
                for _ in range(PROBE_BYTES // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            yield Path(name)
