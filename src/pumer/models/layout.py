"""Names of weights in the published PuMer code (csarron/PuMer) and in pumer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TYPES = "token_type_embeddings.weight"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Layout:
    """How published names of weights map to ours; `#` is the first number in a name, the layer.

    Args:
        model: prefix of all weights but the heads'.
        classes: published name of a head -> its class here.
        names: prefix of a published name -> ours; the first match counts.
        joint: the same for fused weights of queries, keys and values.
        text: prefix of the published names of the text embeddings.
    """

    model: str
    classes: Mapping[str, str]
    names: Mapping[str, str]
    joint: Mapping[str, tuple[str, str, str]]
    text: str

    @property
    def position_ids(self) -> str:
        """The published name of the buffer 0, 1, 2, ..."""
        return f"{self.text}position_ids"

    @property
    def classifiers(self) -> list[str]:
        """Heads that are called `classifier` here."""
        return [head for head in self.classes if head.endswith("_classifier")]

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under our names; unused ones, such as ViLT's `itm_score`, keep theirs.

        Args:
            state: weights under the published names, of any task.
        """
        names = {**self.names, **{f"{head}.": "classifier." for head in self.classifiers}}
        renamed: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name == self.position_ids:
                continue
            if old := _beginning(name, self.joint):
                for new, rows in zip(self.joint[old], tensor.chunk(3), strict=True):
                    renamed[_rename(name, old, new)] = rows
            else:
                old = _beginning(name, names)
                renamed[_rename(name, old, names[old]) if old else name] = tensor
        return renamed

    def from_ours(self, state: Mapping[str, Tensor], head: str | None = None) -> dict[str, Tensor]:
        """The inverse of `to_ours`.

        Args:
            state: weights under our names, all of them.
            head: published name of the module called `classifier`, for the classes that have one.

        Raises:
            ValueError: if there is a classifier, and `head` does not name it.
        """
        names = {new: old for old, new in self.names.items()}
        if any(name.startswith("classifier.") for name in state):
            if head not in self.classifiers:
                raise ValueError(
                    f"head says what the classifier is, one of {', '.join(self.classifiers)}, not "
                    f"{head!r}"
                )
            names["classifier."] = f"{head}."
        queries = {parts[0]: (old, parts) for old, parts in self.joint.items()}
        others = [part for parts in self.joint.values() for part in parts[1:]]
        renamed: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if new := _beginning(name, queries):
                old, parts = queries[new]
                renamed[_rename(name, new, old)] = torch.cat(
                    [state[_rename(name, new, part)] for part in parts]
                )
            elif not _beginning(name, others):
                new = _beginning(name, names)
                renamed[_rename(name, new, names[new]) if new else name] = tensor
        positions = renamed.get(f"{self.text}position_embeddings.weight")
        if positions is not None:
            renamed[self.position_ids] = torch.arange(len(positions), device=positions.device)[None]
        return renamed

    def find_head(self, state: Mapping[str, Tensor]) -> str:
        """The published name of a checkpoint's head, a key of `classes`; raises ValueError without
        one."""
        for head in self.classes:
            if any(name.startswith(f"{head}.") for name in state):
                return head
        raise ValueError(f"the weights have no head that is known: {', '.join(self.classes)}")

    def head_of(self, kind: str) -> str:
        """The published name of the head of a class; raises ValueError if it has none."""
        for head, name in self.classes.items():
            if name == kind:
                return head
        raise ValueError(
            f"the published layout does not support {kind}, only {', '.join(self.classes.values())}"
        )

    def with_head(self, state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
        """Weights to fine-tune on another task, as in the published code: without the old heads.

        For `nlvr2_classifier`, the second image gets the token type embedding of the first;
        `rank_output` starts from the positive class of `itm_score`, if there is one. Other new
        heads are up to the caller.
        """
        old = [f"{name}." for name in self.classes if name != head]
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(old))}
        types = f"{self.model}.{TYPES}"
        if head == "nlvr2_classifier" and types in kept and len(kept[types]) == 2:
            kept[types] = torch.cat([kept[types], kept[types][1:]])
        if head == "rank_output" and "itm_score.fc.weight" in kept:
            for part in ("weight", "bias"):
                kept.setdefault(f"rank_output.{part}", kept[f"itm_score.fc.{part}"][1:])
        return kept


def _beginning(name: str, beginnings: Iterable[str]) -> str:
    pattern = _NUMBER.sub("#", name, count=1)
    return next((beginning for beginning in beginnings if pattern.startswith(beginning)), "")


def _rename(name: str, old: str, new: str) -> str:
    digits = _NUMBER.search(name)
    renamed = new + _NUMBER.sub("#", name, count=1).removeprefix(old)
    return renamed.replace("#", digits[0], 1) if digits else renamed
