"""Additions to transformers' BridgeTower: heads for question answering, entailment and pairs of
images."""

from pumer.models.bridgetower.heads import (
    BridgeTowerForImagesAndTextClassification,
    BridgeTowerForQuestionAnswering,
    BridgeTowerForVisualEntailment,
)

__all__ = [
    "BridgeTowerForImagesAndTextClassification",
    "BridgeTowerForQuestionAnswering",
    "BridgeTowerForVisualEntailment",
]
