"""Shell completion of commands, options and choices; like the help it does not import torch."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any, Literal

from pumer._extras import need


def completion(shell: Literal["bash", "zsh", "fish", "tcsh"]) -> None:
    """Print a script that completes commands, options and choices in a shell.

    Args:
        shell: which shell; `pumer completion bash >
            ~/.local/share/bash-completion/completions/pumer` enables it in new shells.
    """
    need("pumer completion", "completion", "shtab")
    import shtab

    print(shtab.complete(parser(shtab.FILE), shell=shell))


def parser(paths: Mapping[str, Any]) -> ArgumentParser:
    """The command line as an argparse parser, used only for completion.

    Args:
        paths: completes file names in every shell, `shtab.FILE`.
    """
    from pumer.cli import COMMANDS, POSITIONAL
    from pumer.lab.commands.help import options

    top = ArgumentParser(prog="pumer", add_help=False)
    groups = {"": top.add_subparsers(dest="command")}
    parsers = {}
    for name, (path, what) in COMMANDS.items():
        first, _, second = name.partition(" ")
        if first not in parsers:
            parsers[first] = groups[""].add_parser(first, help=None if second else what)
        if second and first not in groups:
            groups[first] = parsers[first].add_subparsers(dest=f"{first}_command")
        command = groups[first].add_parser(second, help=what) if second else parsers[first]
        for option in options(path):
            by_place = name in POSITIONAL and option.default is None
            choices = (
                option.type.split("|") if option.type.islower() and "|" in option.type else None
            )
            argument = command.add_argument(
                option.name if by_place else f"--{option.name}", choices=choices, help=option.help
            )
            if choices is None:  # file names where a value is free: most of those are paths
                argument.complete = paths  # type: ignore[attr-defined]
        config = command.add_argument("--config", help="YAML file with any of these settings")
        config.complete = paths  # type: ignore[attr-defined]
        command.add_argument(
            "--print_config", action="store_true", help="print all settings as they are, and stop"
        )
    return top
