"""Vision-language models that decode: tokens are reduced before and inside the language model."""
