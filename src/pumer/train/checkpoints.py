"""The Trainer's checkpoints after a run that was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def usable_checkpoints(output: Path) -> bool:
    """Whether there is a checkpoint to go on from; what a kill left unfinished is deleted."""
    found = False
    for checkpoint in output.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            found = True
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return found
