"""Measurements as rows of a CSV file: each with the machine, versions, date and settings it came from."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pumer._version import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What a time depends on besides the settings: date, machine and versions. Threads are torch's at the call."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pumer": __version__,
    }


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def append(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, which is made if it is not there; what stands in it is never changed.

    Raises:
        ValueError: if the rows differ in their columns, or the file has other ones.
    """
    if not rows:
        return
    path, columns = Path(path), list(rows[0])
    if any(list(row) != columns for row in rows):
        raise ValueError("rows of one table have the same columns in the same order")
    there = path.is_file() and path.stat().st_size > 0
    if there:
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            other = sorted(set(found) ^ set(columns)) or ["their order"]
            raise ValueError(f"{path} has other columns (differing in {', '.join(other)}): name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not there:
            writer.writeheader()
        writer.writerows(rows)
