"""Run trainings in subprocesses: one at a time per folder, ended with their parent."""

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
    """Train into a folder, resume a stopped training, or do nothing if it has finished; returns the
    model's folder.

    Args:
        folder: gets `training`, the output, and `training.txt`, the log.
        words: options of `pumer train`, without its output.
        processes: number of processes that train together.
        lock: see `launch`.

    Raises:
        ValueError: if the training fails, with the end of its log.
    """
    output = folder / "training"
    if not (output / "log.json").is_file():  # written last
        resume = usable_checkpoints(output)
        if not resume:
            shutil.rmtree(output, ignore_errors=True)
        words = ["train", *words, "--output", str(output), "--resume", str(resume).lower()]
        launch(words, processes, folder / "training.txt", lock)
    return output / "model"


def launch(words: list[str], processes: int, log: Path, lock: IO[str]) -> None:
    """Run a command of `pumer` in subprocesses that end when this process does.

    Args:
        words: the command.
        processes: number of processes that work together.
        log: file that their output is appended to.
        lock: a locked file; it stays locked until they have ended, even if this process is killed.

    Raises:
        ValueError: if the command fails, with the end of its log.
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
