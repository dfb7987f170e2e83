"""Find a model: a folder, a shipped model, or one on the Hub, whose small files are downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from pumer._shipped import model_folder

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
"""The config of a PEFT adapter's folder."""
PROCESSING = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Patterns of the files of tokenizers and processors."""
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""Arguments of `from_pretrained` for downloads from the Hub."""


@dataclass(frozen=True)
class Source:
    """A model's files.

    Args:
        name: for `from_pretrained`, with `hub`.
        folder: of the requested small files, as far as the model has them.
        hub: Hub arguments for `from_pretrained`.
    """

    name: str
    folder: Path
    hub: Mapping[str, Any] = field(default_factory=dict)

    def has(self, file: str) -> bool:
        """Whether the model has a file, one of the requested ones."""
        return (self.folder / file).is_file()


def split_hub(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `from_pretrained` for the Hub, and the others."""
    hub = {name: x for name, x in arguments.items() if name in _HUB and x is not None}
    return hub, {name: x for name, x in arguments.items() if name not in _HUB}


def is_hub_name(name: str | Path) -> bool:
    """Whether this is OWNER/NAME, and no folder of that path exists."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def find_source(name: str | Path, files: Sequence[str], **hub: Any) -> Source:
    """Find a model, and download some of its files if it is on the Hub.

    Args:
        name: a folder, a shipped model's name, or OWNER/NAME on the Hub.
        files: names or patterns of the files to download.
        hub: Hub arguments; see `split_hub`.

    Raises:
        ValueError: if there is no such model, or the download fails.
    """
    subfolder = hub.get("subfolder") or ""
    if not is_hub_name(name):
        folder = Path(name)
        if not any((folder / subfolder / file).is_file() for file in (CONFIG, ADAPTER)):
            folder = model_folder(name)  # raises with what is missing
        there = {"subfolder": subfolder} if subfolder else {}
        return Source(str(folder), folder / subfolder, {"local_files_only": True, **there})
    how = {key: x for key, x in hub.items() if key != "subfolder"}
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    # A star also matches slashes.
    deeper = f"{subfolder}/*/*" if subfolder else "*/*"
    try:
        snapshot = Path(
            snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=deeper, **how)
        )
    except (OSError, ValueError) as error:
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(
            f"there is no folder {name}, and the Hub does not give a model of that name: {reason}\n"
            "Check the name and the revision; a private or gated model needs `token`, or `hf auth "
            "login`"
        ) from error
    # Pin the commit, so that later downloads match even if the branch moves.
    return Source(str(name), snapshot / subfolder, {**hub, "revision": snapshot.name})
