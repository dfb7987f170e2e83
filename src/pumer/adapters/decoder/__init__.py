"""Vision-language models that decode: tokens are reduced before and inside the language model."""

from pumer.adapters.decoder import (  # noqa: F401  # each registers its families
    aria,
    aya,
    deepseek_vl,
    ernie_vl,
    gemma4,
    glm4v,
    got_ocr2,
    internvl,
    llama4,
    llava,
    ovis2,
    paddleocr_vl,
    paligemma,
    pixtral,
    qwen_vl,
    smolvlm,
    vipllava,
)
