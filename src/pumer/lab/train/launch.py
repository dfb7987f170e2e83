"""Trainings in processes of their own: one at a time in a folder, and none that outlives its parent
unnoticed."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from pumer.lab.train.checkpoints import usable_checkpoints

_ON_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG, see prctl(2)
_SHOWN = 4


def train_once(folder: Path, words: list[str], processes: int, lock: IO[str]) -> Path:
    """Train into a folder, go on where that was stopped, or leave it alone if it is done; returns
    the model's folder.

    Args:
        folder: for `training`, all that the training writes, and `training.txt`, all that it says.
        words: options of `pumer train` but for its output.
        processes: that train together.
        lock: see `launch`.

    Raises:
        ValueError: if the training fails, with the end of what it said.
    """
    output = folder / "training"
    if not (output / "log.json").is_file():  # which training writes last
        resume = usable_checkpoints(output)
        if not resume:
            shutil.rmtree(output, ignore_errors=True)
        words = ["train", *words, "--output", str(output), "--resume", str(resume).lower()]
        launch(words, processes, folder / "training.txt", lock)
    return output / "model"


def launch(words: list[str], processes: int, log: Path, lock: IO[str]) -> None:
    """Run a command of `pumer` in new processes, which end when this one does.

    Args:
        words: the command.
        processes: that work together.
        log: file that what they say is added to.
        lock: a locked file, which stays locked until they have ended, even if this process is
            killed.

    Raises:
        ValueError: if it fails, with the end of what it said.
    """
    together = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [sys.executable, "-m", *(together if processes > 1 else []), "pumer.cli", *words]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]
        raise ValueError("\n".join([f"a training failed; the end of {log}:", *last]))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_ON_PARENTS_DEATH, signal.SIGTERM)
