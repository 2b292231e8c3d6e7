"""Run a language model that does not fit in memory: exact, streamed, several times faster than offloading.

>>> from subspec import LLM, SamplingParams
>>> llm = LLM("path/to/model", memory="1.5GiB")
>>> print(llm.generate("Why is the sky blue?", SamplingParams(max_new_tokens=100)).text)

The façade is lazy: importing ``subspec`` loads neither torch nor transformers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspec.errors import (
        BudgetError,
        ContextError,
        DeviceMemoryError,
        ModelError,
        OptionError,
        PinningError,
        StoreError,
        SubspecError,
    )
    from subspec.generation import LLM, Piece, Result, Statistics
    from subspec.planning.plan import Plan
    from subspec.speculation.sampling import SamplingParams

# Threads that wait for each other spin for microseconds, not milliseconds: the reader threads need the cores,
# and on a busy machine a spinning thread keeps the one it waits for from running.  Read once, when torch is
# first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"
_HOMES = {
    "LLM": "subspec.generation",
    "Piece": "subspec.generation",
    "Plan": "subspec.planning.plan",
    "Result": "subspec.generation",
    "SamplingParams": "subspec.speculation.sampling",
    "Statistics": "subspec.generation",
    "BudgetError": "subspec.errors",
    "ContextError": "subspec.errors",
    "DeviceMemoryError": "subspec.errors",
    "ModelError": "subspec.errors",
    "OptionError": "subspec.errors",
    "PinningError": "subspec.errors",
    "StoreError": "subspec.errors",
    "SubspecError": "subspec.errors",
}
__all__ = [
    "LLM",
    "BudgetError",
    "ContextError",
    "DeviceMemoryError",
    "ModelError",
    "OptionError",
    "Piece",
    "Plan",
    "Result",
    "SamplingParams",
    "Statistics",
    "PinningError",
    "StoreError",
    "SubspecError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'subspec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
