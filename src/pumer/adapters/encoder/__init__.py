"""Joint encoders: tokens are reduced between attention and MLP of a layer."""
