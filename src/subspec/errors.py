"""The errors users can meet: one small tree, every message says what, the numbers and the remedy.

The command line prints these as ``error: …`` and exits with 2; anything else is a bug and keeps its
traceback.
"""


class SubspecError(Exception):
    """Base of every error that a user can cause and mend."""


class OptionError(SubspecError, ValueError):
    """An option or argument that cannot be used as given."""


class ModelError(SubspecError):
    """A checkpoint that is missing, damaged, or of a kind that is not understood."""


class StoreError(SubspecError):
    """A prepared store that is missing, stale, damaged or of another format."""


class BudgetError(SubspecError):
    """A memory budget that cannot hold the model's minimum."""


class DeviceMemoryError(SubspecError):
    """A device that ran out of memory, although the engine kept within its budget."""


class PinningError(SubspecError):
    """Host memory that the device's driver does not lock."""


class ContextError(SubspecError):
    """A prompt that does not fit the context."""
