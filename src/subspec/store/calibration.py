"""The side file of a store: what decoding has learnt of its draft, for the next process to start from.

Not part of what the manifest seals: it changes with use, and a store works as well without it.
"""

import json
import math
import os
from pathlib import Path

FILE = "calibration.json"
VERSION = 1
Values = dict[str, float]


def load_calibration(store: Path) -> dict[str, Values]:
    """Learnt numbers by what they are for; empty where there are none, or none that can be read."""
    try:
        content = json.loads((store / FILE).read_text())
        if content["version"] != VERSION:
            return {}
        found = {
            name: {key: float(one) for key, one in part.items()} for name, part in content["learnt"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found if all(math.isfinite(one) for part in found.values() for one in part.values()) else {}


def save_calibration(store: Path, learnt: dict[str, Values]) -> bool:
    """Replace the side file, whole or not at all; False where the store cannot be written."""
    unfinished = store / f"{FILE}.{os.getpid()}.part"
    try:
        unfinished.write_text(json.dumps({"version": VERSION, "learnt": learnt}, indent=1) + "\n")
        unfinished.replace(store / FILE)
    except OSError:
        unfinished.unlink(missing_ok=True)
        return False
    return True
