"""Models that read images by cross-attention: Q-formers, resamplers, and writers with an encoder.

No prompt holds their image tokens, so what `decoder` hooks into is not there: here a module that
reads an encoder's output is wrapped. Importing it registers the families.
"""

from pumer.adapters.cross import (  # noqa: F401
    blip,
    florence2,
    idefics,
    idefics2,
    kosmos,
    mllama,
    pix2struct,
    pp_formulanet,
    qformer,
    t5gemma2,
    vision_encoder_decoder,
)
