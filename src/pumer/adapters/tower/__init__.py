"""Vision transformers, alone or in front of another model: tokens are reduced inside them."""
