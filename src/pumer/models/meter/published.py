"""METER checkpoints in the layout of the published PuMer code: names of weights, and settings.

The names are those of the original METER, with `meter.` in front of all but the heads and without
the `visual.` of the vision tower; see `pumer.models.lightning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig

from pumer.models import published
from pumer.models.layout import Layout
from pumer.models.meter.configuration import MeterConfig
from pumer.models.meter.resize import resize_positions
from pumer.models.published import setting, shape
from pumer.reducers import DynamicViT, PuMer

CLASSES = {
    "vqa_classifier": "MeterForQuestionAnswering",
    "nlvr2_classifier": "MeterForImagesAndTextClassification",
    "ve_classifier": "MeterForVisualEntailment",
    "rank_output": "MeterForImageAndTextRetrieval",
    "mlm_score": "MeterForMaskedLM",
}
"""Published name of a head -> its class."""

_TEXT = "meter.text_transformer."
_VISION = "meter.vit_model."
_BLOCK = f"{_VISION}transformer.resblocks.#."
_OUR_VISION = "meter.vision_model."
_LAYER = f"{_OUR_VISION}encoder.layers.#."
_FUSION = "meter.cross_modal_text_layers."
_POSITIONS = f"{_VISION}positional_embedding"
LAYOUT = Layout(
    model="meter",
    classes=CLASSES,
    names={
        _TEXT: "meter.text_model.",
        f"{_VISION}class_embedding": f"{_OUR_VISION}embeddings.class_embedding",
        _POSITIONS: f"{_OUR_VISION}embeddings.position_embedding.weight",
        f"{_VISION}conv1.": f"{_OUR_VISION}embeddings.patch_embedding.",
        f"{_VISION}ln_pre.": f"{_OUR_VISION}pre_layrnorm.",
        f"{_VISION}ln_post.": f"{_OUR_VISION}post_layernorm.",
        f"{_BLOCK}ln_1.": f"{_LAYER}layer_norm1.",
        f"{_BLOCK}ln_2.": f"{_LAYER}layer_norm2.",
        f"{_BLOCK}attn.out_proj.": f"{_LAYER}self_attn.out_proj.",
        f"{_BLOCK}mlp.c_fc.": f"{_LAYER}mlp.fc1.",
        f"{_BLOCK}mlp.c_proj.": f"{_LAYER}mlp.fc2.",
        "meter.cross_modal_text_transform.": "meter.text_projection.",
        "meter.cross_modal_image_transform.": "meter.image_projection.",
        "meter.token_type_embeddings.": "meter.modality_embeddings.",
        f"{_FUSION}#.": "meter.layers.#.text.",
        "meter.cross_modal_image_layers.#.": "meter.layers.#.image.",
        "meter.cross_modal_text_pooler.": "meter.text_pooler.",
        "meter.cross_modal_image_pooler.": "meter.image_pooler.",
        "itm_score.fc.": "itm_score.",
        "mlm_score.transform.": "transform.",
        "mlm_score.bias": "decoder.bias",
        "mlm_score.decoder.": "decoder.",
    },
    joint={
        f"{_BLOCK}attn.in_proj_": (
            f"{_LAYER}self_attn.q_proj.",
            f"{_LAYER}self_attn.k_proj.",
            f"{_LAYER}self_attn.v_proj.",
        )
    },
    text=f"{_TEXT}embeddings.",
)

_KNOWN = [
    "image_size",
    "num_top_layer",
    "vit_patch_size",
    "text_encoder",
    "image_encoder",
    "fusion",
    "input_image_embed_size",
    "input_text_embed_size",
    "resolution_before",
]


def unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Unknown names in a published config.json."""
    return published.unknown_settings(settings, [*_KNOWN, *PreTrainedConfig().to_dict()])


def model_config(
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    head: str | None = None,
    answers: list[str] | None = None,
) -> MeterConfig:
    """The configuration of a published checkpoint.

    Sizes are read off the weights. What does not show there is as in the published code:
    RoBERTa-base, CLIP-ViT-B/16 and six fusion layers, unless config.json says otherwise:
    `num_heads`, `num_top_layer`, `drop_rate`, `image_size`, and in the objects `text_encoder`
    (layers, heads, act, layer_norm_eps, pad_token_id), `image_encoder` (blocks, heads, act,
    layer_norm_eps) and `fusion` (act, layer_norm_eps), which only tests and our own checkpoints
    have.

    Args:
        settings: config.json.
        state: weights under the published names.
        head: the head's published name; told by the weights if not given.
        answers: of question answering, in order.

    Raises:
        ValueError: for weights without the sizes, and for settings that METER cannot have.
    """
    text, vision, fusion = (
        _part(settings, name) for name in ("text_encoder", "image_encoder", "fusion")
    )
    vocabulary, text_width = shape(state, f"{_TEXT}embeddings.word_embeddings.weight", 2)
    filters = shape(state, f"{_VISION}conv1.weight", 4)
    if filters[2] != filters[3]:
        raise ValueError(
            f"METER has square patches, the weights have {filters[2]} x {filters[3]} pixels"
        )
    width = shape(state, "meter.token_type_embeddings.weight", 2)[1]
    positions = shape(state, _POSITIONS, 2)[0]
    drop_rate = settings.get("drop_rate", 0.1)
    text_config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        num_hidden_layers=published.depth(
            state, f"{_TEXT}encoder.layer.", published.whole(text, "layers", 0)
        ),
        num_attention_heads=published.heads(text, "heads", 12, text_width),
        intermediate_size=shape(state, f"{_TEXT}encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_position_embeddings=shape(state, f"{_TEXT}embeddings.position_embeddings.weight", 2)[0],
        type_vocab_size=shape(state, f"{_TEXT}embeddings.token_type_embeddings.weight", 2)[0],
        hidden_act=text.get("act", "gelu"),
        layer_norm_eps=text.get("layer_norm_eps", 1e-5),
        pad_token_id=published.whole(text, "pad_token_id", 1),
    )
    vision_config = CLIPVisionConfig(
        hidden_size=filters[0],
        num_hidden_layers=published.depth(
            state, f"{_VISION}transformer.resblocks.", published.whole(vision, "blocks", 0)
        ),
        num_attention_heads=published.heads(vision, "heads", 12, filters[0]),
        intermediate_size=shape(state, f"{_VISION}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        num_channels=filters[1],
        image_size=published.whole(
            settings, "image_size", round((positions - 1) ** 0.5) * filters[2]
        ),
        patch_size=filters[2],
        hidden_act=vision.get("act", "quick_gelu"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-5),
    )
    config = MeterConfig(
        text_config=text_config,
        vision_config=vision_config,
        hidden_size=width,
        num_hidden_layers=published.depth(
            state, _FUSION, published.whole(settings, "num_top_layer", 0)
        ),
        num_attention_heads=published.heads(settings, "num_heads", 12, width),
        intermediate_size=shape(state, f"{_FUSION}0.intermediate.dense.weight", 2)[0],
        hidden_act=fusion.get("act", "gelu"),
        layer_norm_eps=fusion.get("layer_norm_eps", 1e-12),
        hidden_dropout_prob=drop_rate,
        attention_probs_dropout_prob=drop_rate,
        modality_type_vocab_size=shape(state, "meter.token_type_embeddings.weight", 2)[0],
        update=settings.get("update", "sequential"),
    )
    published.set_labels(config, head or LAYOUT.find_head(state), state, 2 * width, answers)
    return config


def resize(
    state: Mapping[str, Tensor], config: MeterConfig, image_size: int
) -> Mapping[str, Tensor]:
    """The weights for another image size, which is set in the configuration.

    Raises:
        ValueError: if the images have no whole number of patches.
    """
    published.check_image_size(image_size, config.patch_size)
    config.vision_config.image_size = image_size
    return {
        **state,
        _POSITIONS: resize_positions(state[_POSITIONS], image_size // config.patch_size),
    }


def pruned_layer(number: int) -> int:
    """The layer of a number in `prune_layers`, which counts every fusion layer twice, from 2."""
    return number // 2 - 1


def reducer(settings: Mapping[str, Any]) -> PuMer | DynamicViT | None:
    """The reducer of a published config.json, with `official="meter"`.

    `reduce_layers` there counts twice per fusion layer, and odd numbers never come up; the scores
    are always mean heads and the merging is always ToMe's, whatever `sim_method` and `merge_style`
    say. Without any reduction, and without pruning, it is one that reduces nothing and has the
    published softmax. None only for what was never meant for the published code.

    Raises:
        ValueError: for settings that contradict each other or do not exist.
    """
    if learned := published.learned_pruning(settings, pruned_layer):
        return learned
    official: Literal[False, "meter"] = "meter" if published.is_official(settings) else False
    if not official and setting(settings, "prune_r", None) is None:
        return None
    prune, merge, merge_text, numbers = published.reduction(settings)
    layers = tuple(index // 2 for index in numbers or () if index % 2 == 0)
    if not layers or (official and not prune):
        return PuMer(official=official, prune=0, merge=0, merge_text=0, layers=())
    return PuMer(official=official, prune=prune, merge=merge, merge_text=merge_text, layers=layers)


def settings_of(model: Any, reducer: PuMer | None) -> dict[str, Any]:
    """The published config.json of a model and its reducer.

    Raises:
        ValueError: if the published code could not have such a model.
    """
    config = model.config
    text, vision = config.text_config, config.vision_config
    if config.hidden_dropout_prob != config.attention_probs_dropout_prob:
        raise ValueError(
            "the published METER has one dropout for states and attention: make the two equal"
        )
    if reducer is not None and reducer.score != "mean_head":
        raise ValueError(f"the published METER scores by mean_head, not by {reducer.score}")
    settings = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": text.num_hidden_layers,
        "num_top_layer": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "drop_rate": config.hidden_dropout_prob,
        "vocab_size": config.vocab_size,
        "max_text_len": config.max_position_embeddings,
        "token_types": config.modality_type_vocab_size,
        "image_size": config.image_size,
        "vit_patch_size": config.patch_size,
        "text_encoder": {
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "act": text.hidden_act,
            "layer_norm_eps": text.layer_norm_eps,
            "pad_token_id": text.pad_token_id,
        },
        "image_encoder": {
            "blocks": vision.num_hidden_layers,
            "heads": vision.num_attention_heads,
            "act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
        },
        "fusion": {"act": config.hidden_act, "layer_norm_eps": config.layer_norm_eps},
        "prune_layers": None,
        "keep_ratio": 1,
    }
    if reducer is not None:
        settings |= {
            "prune_r": reducer.prune,
            "merge_r": reducer.merge,
            "merge_text": reducer.merge_text,
            "reduce_layers": [2 * layer for layer in reducer.layers or ()],
        }
    settings |= {} if config.update == "sequential" else {"update": config.update}
    return settings | ({} if reducer is not None and reducer.official else {"official": False})


def finish(model: Any, settings: Mapping[str, Any]) -> None:
    """Nothing to do: METER's configuration expresses all settings."""


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = settings.get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"{name} in config.json is an object, not {part!r}")
    return part
