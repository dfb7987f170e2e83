"""Checkpoints of a training that was stopped: which can be resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")  # the Trainer's; others are the user's
_STATES = {
    "optimizer": ("optimizer*", "global_step*"),  # torch's, FSDP's and DeepSpeed's
    "scheduler": ("scheduler.pt", "global_step*"),
}


def usable_checkpoints(output: Path) -> bool:
    """Whether there is a checkpoint to resume from; deletes those that were only half written."""
    any_usable = False
    for checkpoint in _checkpoints(output):
        try:
            json.loads(
                (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
            )  # written last
            any_usable = True
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return any_usable


def check_last_checkpoint(output: Path) -> None:
    """Raise ValueError if the last checkpoint has no optimizer or scheduler state."""
    checkpoint = _checkpoints(output)[-1]
    lacking = [
        name
        for name, patterns in _STATES.items()
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    if lacking:
        raise ValueError(
            f"{checkpoint} lacks the state of its {' and '.join(lacking)}, which a training needs "
            "to resume (trainer.save_only_model omits it): delete this checkpoint to resume from "
            "an earlier one, or start again with another --output"
        )


def _checkpoints(output: Path) -> list[Path]:
    """The Trainer's own checkpoints, ordered by step."""
    numbered = {
        path: match for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    }
    return sorted(
        (path for path in numbered if path.is_dir()), key=lambda path: int(numbered[path][1])
    )
