"""Vision-language models that decode: tokens are reduced before and inside the language model."""

from pumer.adapters.decoder import (  # noqa: F401  # each registers its families
    internvl,
    llava,
    paligemma,
    qwen_vl,
    smolvlm,
    vipllava,
)
