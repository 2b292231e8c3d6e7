"""What speculation has learnt of a model on this machine: kept for the next process, shown in results."""

from dataclasses import asdict
from typing import Any

from subspec.speculation.calibration import CALIBRATION_NAMES, Calibration
from subspec.speculation.policy import Policy


class Learner:
    """Holds what is learnt.

    Args:
        policy: decides, and knows what passes cost; None: nothing is learnt.
        calibrations: by whether tokens are drawn.
    """

    def __init__(self, policy: Policy | None, calibrations: dict[bool, Calibration]) -> None:
        self.calibrations = calibrations
        self._learns = policy

    def learnt(self) -> dict[str, dict[str, float]]:
        """What is worth keeping for the next process: ``calibration.calibrations`` reads it."""
        if self._learns is None:
            return {}
        return {CALIBRATION_NAMES[drawn]: one.learnt() for drawn, one in self.calibrations.items()}

    def describe(self) -> dict[str, Any]:
        """What was learnt, as plain data for result files: probabilities and their reliability, and times."""
        policy = self._learns
        if policy is None:
            return {}
        times = policy.times
        return {
            "calibration": {
                CALIBRATION_NAMES[drawn]: {
                    **one.learnt(),
                    "observations": one.observations,
                    "error": one.reliability.error,
                    "reliability": asdict(one.reliability),
                }
                for drawn, one in self.calibrations.items()
            },
            "draft_s": {str(rows): seconds for rows, seconds in sorted(times.draft.seen.items())},
            "sweep_base_s": times.sweep.base_s,
            "sweep_row_s": times.sweep.row_s,
            "link_s": times.link_s,
            "agreement": policy.agreement,
            "gap_value": policy.gap_value,
        }
