"""What the heads of several families have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

LABELS = ("contradiction", "neutral", "entailment")
"""Classes of visual entailment, in the order of the published checkpoints."""


def classifier(config: Any, width: int) -> nn.Sequential:
    """A classifier over `config.num_labels` labels for pooled states [B,width]."""
    inner = 2 * config.hidden_size
    return nn.Sequential(
        nn.Linear(width, inner), nn.LayerNorm(inner), nn.GELU(), nn.Linear(inner, config.num_labels)
    )


def name_entailment_labels(config: Any) -> None:
    """Name the labels of a configuration `LABELS`, unless it has names."""
    if all(str(name).startswith("LABEL_") for name in config.id2label.values()):
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {label: index for index, label in enumerate(LABELS)}
