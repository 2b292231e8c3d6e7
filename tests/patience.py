"""Run what might hang, without hanging the suite."""

import threading
from collections.abc import Callable

PATIENCE_S = 60.0  # a hang becomes a failure; nothing else depends on it


def finishes(work: Callable[[], None], seconds: float = PATIENCE_S) -> None:
    """Run ``work`` in a thread; a hang is a failure, and so is what it raises."""
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]
