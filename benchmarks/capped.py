"""Run a command in control groups (version 1) that cap its memory and its disk reads.  Needs root.

    python benchmarks/capped.py --memory 2236MiB --disk-gb-s 1.0 --path STORE_OR_FOLDER -- COMMAND [ARG ...]

The memory cap counts the page cache too.  The disk cap is on the device that holds ``--path``; it counts
O_DIRECT reads.  Exits with the command's status, and says on standard error how often the memory cap was
hit.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from subspec.memory.tiers import parse_size

ROOT = Path("/sys/fs/cgroup")


def block_device(path: Path) -> str:
    """``major:minor`` of the whole disk that holds ``path``."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    entry = Path("/sys/dev/block", number).resolve()
    if (entry / "partition").exists():
        return (entry.parent / "dev").read_text().strip()
    return number


def main() -> int:
    """Make the groups, run the command inside, remove the groups."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", help="cap on the memory of the command, page cache included")
    parser.add_argument("--disk-gb-s", type=float, help="cap on reads, in 10^9 bytes a second")
    parser.add_argument("--path", type=Path, default=Path.cwd(), help="a path on the disk to cap")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    name = f"subspec-{os.getpid()}"
    groups = []
    if options.memory:
        group = ROOT / "memory" / name
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(parse_size(options.memory)))
        groups.append(group)
    if options.disk_gb_s:
        group = ROOT / "blkio" / name
        group.mkdir()
        limit = f"{block_device(options.path)} {int(options.disk_gb_s * 1e9)}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        groups.append(group)

    def enter() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        status = subprocess.run(options.command, preexec_fn=enter, check=False).returncode
        if options.memory:
            peak = int((groups[0] / "memory.max_usage_in_bytes").read_text())
            hits = (groups[0] / "memory.failcnt").read_text().strip()
            sys.stderr.write(f"memory cap: peak use {peak} bytes, hit {hits} times\n")
        return status
    finally:
        for group in groups:
            group.rmdir()


if __name__ == "__main__":
    sys.exit(main())
