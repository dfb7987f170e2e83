"""What transformers' ViLT lacks: other patch sizes, visual entailment, the published layouts."""
