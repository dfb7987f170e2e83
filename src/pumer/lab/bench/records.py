"""Machine, versions and date, for every row of measurements."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch
import transformers

from pumer._version import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What times depend on besides the settings: date, machine, versions and torch's current
    threads."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pumer": __version__,
    }


def cpu_name() -> str:
    """The processor's model name, if the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
