"""Training with reducers on: a thin layer over transformers' Trainer, so that everything of its
comes along."""
