"""The configuration of METER."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig


class MeterConfig(PreTrainedConfig):
    """The configuration of a METER model; defaults are METER-CLIP16-RoBERTa at 384 pixels.

    Args:
        text_config: of the RoBERTa encoder.
        vision_config: of the CLIP vision tower. METER omits the last of CLIP's twelve layers.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
            layer_norm_eps,
            hidden_dropout_prob, attention_probs_dropout_prob: of the fusion layers.
        modality_type_vocab_size: token types: text, image, and a second image if there are two.
        num_images: images per example in `MeterForImagesAndTextClassification`.
        update: which text states the image half of a fusion layer attends to. "parallel": the
            layer's inputs, as in the original METER; "sequential": the text half's outputs, as in
            the published PuMer code. Weights are for one of the two.
        initializer_range: standard deviation of new weights.
    """

    model_type = "meter"
    sub_configs: ClassVar = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | RobertaConfig | None = None,
        vision_config: dict[str, Any] | CLIPVisionConfig | None = None,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        modality_type_vocab_size: int = 2,
        num_images: int = 1,
        update: Literal["parallel", "sequential"] = "parallel",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if update not in ("parallel", "sequential"):
            raise ValueError(f"update is 'parallel' or 'sequential', not {update!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads "
                f"{num_attention_heads}"
            )
        if text_config is None:
            text_config = {
                "vocab_size": 50265,
                "max_position_embeddings": 514,
                "type_vocab_size": 1,
            }
            text_config["layer_norm_eps"] = 1e-5
        if vision_config is None:
            vision_config = {
                "image_size": 384,
                "patch_size": 16,
                "num_hidden_layers": 11,
                "layer_norm_eps": 1e-5,
            }
        self.text_config = (
            RobertaConfig(**text_config) if isinstance(text_config, dict) else text_config
        )
        self.vision_config = (
            CLIPVisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.modality_type_vocab_size = modality_type_vocab_size
        self.num_images = num_images
        self.update = update
        self.initializer_range = initializer_range
        self.is_decoder = False  # read by BERT's attention modules
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of text tokens."""
        return self.text_config.vocab_size

    @property
    def pad_token_id(self) -> int | None:
        """The text encoder's padding token."""
        return self.text_config.pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        if value is not None:
            self.text_config.pad_token_id = value

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.vision_config.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.vision_config.patch_size

    @property
    def max_position_embeddings(self) -> int:
        """The longest text, special tokens included; RoBERTa skips positions up to its padding
        token's."""
        return self.text_config.max_position_embeddings - self.text_config.pad_token_id - 1
