"""PI0 (Black et al., 2024) as transformers has it.

PaliGemma reads the cameras' images and the order once. An expert with as many layers turns noise
into actions, step by step; each of its layers looks at what PaliGemma's has left in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pumer.adapters.base import Patch, config_of, register
from pumer.adapters.decoder import attention as decoder_attention
from pumer.adapters.decoder.costs import linear_weights
from pumer.adapters.decoder.paligemma import PaliGemmaAdapter
from pumer.adapters.decoder.prompt import ImageSpan


@register
class PI0Adapter(PaliGemmaAdapter):
    """The expert attends to the tokens that are left in its layer."""

    family = "PI0"
    classes: ClassVar[tuple[str, ...]] = ("PI0ForConditionalGeneration",)
    placeholder_hook = None
    merges_images = True
    entrances = ("forward", "sample_actions")
    decodes = False

    def trunk(self, model: nn.Module) -> Any:
        return getattr(getattr(model, "model", model), "vlm", model)

    def followers(self, model: Any) -> Sequence[Any]:
        return (model.model.dit,)

    def patch(self, model: Any, patch: Patch) -> None:
        decoder_attention.check_backend(model.model.dit.config)
        super().patch(model, patch)

    def spans_in_prompt(
        self, images: list[ImageSpan], image_BS: Tensor, inputs: dict[str, Any]
    ) -> list[ImageSpan]:
        # The sample with fewer cameras has empty images behind its own.
        real = inputs["pixel_attention_mask"].flatten().tolist()
        return [image for image, is_real in zip(images, real, strict=True) if is_real]

    def macs(
        self,
        model: Any,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Costs of one chunk of actions: the prompt once, the expert at every step."""
        parts = super().macs(model, lengths, entry, tower, after_layer)
        config, expert = config_of(model), model.model.dit
        heads, channels = self.attention_shape(model)
        tokens = config.chunk_size + 1  # and the state of the robot
        keys = sum(sum(pair) + tokens for pair in lengths[:-1])
        outside = linear_weights(model.embed_action_time) + linear_weights(model.action_out_proj)
        step = tokens * (linear_weights(expert) + outside) + 2 * tokens * keys * heads * channels
        del parts["head"]
        return parts | {"expert": config.num_inference_steps * step}
