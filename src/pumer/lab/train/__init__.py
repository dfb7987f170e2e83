"""Training with an active reducer, on top of transformers' Trainer."""
