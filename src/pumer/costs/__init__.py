"""What a model and its reducer cost: tokens, multiply-accumulates, caches."""
