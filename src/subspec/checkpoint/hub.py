"""Models from the Hugging Face hub, where a network exists. Knows nothing of what the files hold."""

from __future__ import annotations

import re
from pathlib import Path

from subspec.checkpoint.tokenizer import PATTERNS
from subspec.errors import ModelError

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_WANTED = ["*.safetensors", "model.safetensors.index.json", "config.json", *PATTERNS]
# Some repositories carry the same weights a second time under these names.
_UNWANTED = ["consolidated*", "original/*", "*/*.safetensors"]


def is_hub_id(model: str | Path) -> bool:
    """Whether this reads as ``org/name``."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None


def fetch_snapshot(model: str) -> Path:
    """The local directory of a hub model, downloaded first where needed; safetensors only.

    Raises:
        ModelError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    here = f"{model!r} is no file or directory here, and as a hub id"
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise ModelError(
            f"{here} it is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{here} it does not exist, or needs a login (`hf auth login`)") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{here} it could not be downloaded: {reason}; offline, give a local directory or .gguf file"
        ) from error
