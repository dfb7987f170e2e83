"""Additions to transformers' ViLT: other patch sizes, visual entailment, published layouts."""

from pumer.models.vilt.entailment import ViltForVisualEntailment

__all__ = ["ViltForVisualEntailment"]
