"""What transformers' ViLT lacks: other patch sizes, visual entailment, the published layouts."""

from pumer.models.vilt.entailment import ViltForVisualEntailment

__all__ = ["ViltForVisualEntailment"]
