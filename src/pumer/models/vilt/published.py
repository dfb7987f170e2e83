"""ViLT checkpoints in the layout of the published PuMer code: names of weights, and settings.

The published names are those of the original ViLT, with `vilt.` in front of all but the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.vilt.configuration_vilt import ViltConfig

from pumer.models import published
from pumer.models.layout import Layout
from pumer.models.published import setting, shape
from pumer.reducers import DynamicViT, PuMer

CLASSES = {
    "vqa_classifier": "ViltForQuestionAnswering",
    "nlvr2_classifier": "ViltForImagesAndTextClassification",
    "ve_classifier": "ViltForVisualEntailment",
    "rank_output": "ViltForImageAndTextRetrieval",
    "mlm_score": "ViltForMaskedLM",
}
"""Published name of a head -> its class."""

_BLOCK = "vilt.transformer.blocks.#."
_LAYER = "vilt.encoder.layer.#."
LAYOUT = Layout(
    model="vilt",
    classes=CLASSES,
    names={
        "vilt.text_embeddings.": "vilt.embeddings.text_embeddings.",
        "vilt.token_type_embeddings.": "vilt.embeddings.token_type_embeddings.",
        "vilt.transformer.cls_token": "vilt.embeddings.cls_token",
        "vilt.transformer.pos_embed": "vilt.embeddings.position_embeddings",
        "vilt.transformer.patch_embed.proj.": "vilt.embeddings.patch_embeddings.projection.",
        "vilt.transformer.norm.": "vilt.layernorm.",
        f"{_BLOCK}norm1.": f"{_LAYER}layernorm_before.",
        f"{_BLOCK}norm2.": f"{_LAYER}layernorm_after.",
        f"{_BLOCK}attn.proj.": f"{_LAYER}attention.output.dense.",
        f"{_BLOCK}mlp.fc1.": f"{_LAYER}intermediate.dense.",
        f"{_BLOCK}mlp.fc2.": f"{_LAYER}output.dense.",
        "mlm_score.bias": "mlm_score.decoder.bias",
    },
    joint={
        f"{_BLOCK}attn.qkv.": (
            f"{_LAYER}attention.attention.query.",
            f"{_LAYER}attention.attention.key.",
            f"{_LAYER}attention.attention.value.",
        )
    },
    text="vilt.text_embeddings.",
)

_SCORES = {"mh": "mean_head", "fh": "first_head", "km": "k_metric"}
_FIXED = ("hidden_act", "layer_norm_eps", "qkv_bias", "max_image_length")


def unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Unknown names in a published config.json."""
    return published.unknown_settings(settings, ["pos_grid", *ViltConfig().to_dict()])


def model_config(
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    head: str | None = None,
    answers: list[str] | None = None,
) -> ViltConfig:
    """The transformers configuration of a published checkpoint.

    Sizes are read from the weights. These do not show the number of heads and the grid of
    positions, which come from `num_heads` (12) and `pos_grid` ([12, 12]).

    Args:
        settings: config.json.
        state: weights under the published names.
        head: the head's published name; default: from the weights.
        answers: of question answering, in order.

    Raises:
        ValueError: if weights are missing, or transformers' ViLT does not support a setting.
    """
    vocabulary, width = shape(state, "vilt.text_embeddings.word_embeddings.weight", 2)
    patch = shape(state, "vilt.transformer.patch_embed.proj.weight", 4)
    grid = settings.get("pos_grid", [12, 12])
    if (
        not isinstance(grid, list)
        or len(grid) != 2
        or grid[0] != grid[1]
        or not isinstance(grid[0], int)
    ):
        raise ValueError(
            f"pos_grid in config.json is two equal numbers, for example [12, 12], not {grid!r}"
        )
    if patch[2] != patch[3]:
        raise ValueError(
            f"transformers' ViLT has square patches, the weights have {patch[2]} x {patch[3]} "
            "pixels"
        )
    config = ViltConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=published.depth(
            state, "vilt.transformer.blocks.", published.whole(settings, "num_layers", 0)
        ),
        num_attention_heads=published.heads(settings, "num_heads", 12, width),
        intermediate_size=shape(state, "vilt.transformer.blocks.0.mlp.fc1.weight", 2)[0],
        max_position_embeddings=shape(state, "vilt.text_embeddings.position_embeddings.weight", 2)[
            0
        ],
        type_vocab_size=shape(state, "vilt.text_embeddings.token_type_embeddings.weight", 2)[0],
        modality_type_vocab_size=shape(state, "vilt.token_type_embeddings.weight", 2)[0],
        num_channels=patch[1],
        patch_size=patch[2],
        image_size=grid[0] * patch[2],
    )
    published.set_labels(config, head or LAYOUT.find_head(state), state, width, answers)
    return config


def resize(
    state: Mapping[str, Tensor], config: ViltConfig, image_size: int
) -> Mapping[str, Tensor]:
    """The weights, unchanged: ViLT resizes its position embeddings at run time.

    Raises:
        ValueError: if the image size is not a multiple of the patch size.
    """
    published.check_image_size(image_size, config.patch_size)
    return state


def pruned_layer(number: int) -> int:
    """The layer of a number in `prune_layers`."""
    return number


def reducer(settings: Mapping[str, Any]) -> PuMer | DynamicViT | None:
    """The reducer of a published config.json, with `official=True`.

    Without one, a reducer that reduces nothing but uses the published softmax. None only for
    checkpoints that are not for the published code.

    Raises:
        ValueError: for settings that contradict each other or do not exist.
    """
    if learned := published.learned_pruning(settings, pruned_layer):
        return learned
    official = published.is_official(settings)
    if not official and setting(settings, "prune_r", None) is None:
        return None
    prune, merge, merge_text, layers = published.reduction(settings)
    joint = official and prune == 0 and merge >= 1  # a count; without layers, in all of them
    if not (prune or merge or merge_text) or not (layers or (layers is None and joint)):
        return PuMer(official=official, prune=0, merge=0, merge_text=0, layers=())
    score = setting(settings, "sim_method", "mean_head")
    return PuMer(
        official=official,
        prune=prune,
        merge=merge,
        merge_text=merge_text,
        layers="all" if layers is None else tuple(layers),
        score=_SCORES.get(score, score),
        style=setting(settings, "merge_style", "tome"),
    )


def settings_of(model: Any, reducer: PuMer | None) -> dict[str, Any]:
    """The published config.json of a model and its reducer.

    Raises:
        ValueError: if the published code does not support the model.
    """
    config, default = model.config, ViltConfig()
    for name in _FIXED:
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"the published ViLT has {name} {getattr(default, name)!r}, not "
                f"{getattr(config, name)!r}"
            )
    side = config.image_size // config.patch_size
    settings = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "drop_rate": model.vilt.embeddings.text_embeddings.dropout.p,
        "vocab_size": config.vocab_size,
        "max_text_len": config.max_position_embeddings,
        "token_types": config.modality_type_vocab_size,
        "patch_size": config.patch_size,
        "pos_grid": [side, side],
        "prune_layers": None,
        "keep_ratio": 1,
    }
    if reducer is not None:
        settings |= {
            "prune_r": reducer.prune,
            "merge_r": reducer.merge,
            "merge_text": reducer.merge_text,
            "reduce_layers": None if reducer.layers == "all" else list(reducer.layers or ()),
            "sim_method": reducer.score,
            "merge_style": reducer.style,
        }
    return settings | ({} if reducer is not None and reducer.official else {"official": False})


def finish(model: Any, settings: Mapping[str, Any]) -> None:
    """Set what the configuration cannot express, and `save` therefore loses.

    The published dropout applies to the text embeddings only.
    """
    model.vilt.embeddings.text_embeddings.dropout.p = float(settings.get("drop_rate", 0.1))
