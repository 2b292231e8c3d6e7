"""A GGUF file's tokenizer, converted by ``transformers`` in a process of its own.

The conversion holds hundreds of megabytes for a vocabulary of 152,000; they go back to the system with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from subspec.errors import ModelError

_TIMEOUT_S = 600


def export_gguf_tokenizer(path: Path, directory: Path) -> None:
    """Write tokenizer files and the chat template of a GGUF file into a directory.

    Raises:
        ModelError: ``transformers`` cannot convert this tokenizer.
    """
    command = [sys.executable, "-P", "-m", __name__, str(path), str(directory)]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"the tokenizer of {path} could not be converted: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"transformers cannot convert the tokenizer of {path}: {reason}")


def main(path: Path, directory: Path) -> None:
    """The conversion itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.save_pretrained(str(directory))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
