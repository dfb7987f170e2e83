"""The stock methods that our adapters stand in for are still those that they were written against.

Only for the version of transformers that constraints.txt pins: raising the pin runs these on the
new one.
"""

import ast
import hashlib
import inspect
import textwrap
from pathlib import Path

import pytest
import transformers
from transformers import cache_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert import modeling_bert as bert
from transformers.models.bridgetower import modeling_bridgetower as bridgetower
from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.granite4_vision import modeling_granite4_vision as granite4_vision
from transformers.models.granite_docling import modeling_granite_docling as granite_docling
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.internvl import modeling_internvl as internvl
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.molmo2 import modeling_molmo2 as molmo2
from transformers.models.pixtral import modeling_pixtral as pixtral
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.smolvlm import modeling_smolvlm as smolvlm
from transformers.models.vilt import modeling_vilt as vilt
from transformers.models.vit import modeling_vit as vit

PINS = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").split()


def trunk(name):
    """A family's model without its head."""
    return getattr(transformers, f"{name}Model")


STOOD_IN_FOR = {  # the fingerprint we know, and what of ours stands in
    (vilt.ViltModel, "forward"): ("058b0e7663bd2e70", "_forward in encoder/vilt.py"),
    (vilt.ViltEmbeddings, "forward"): ("f759e118b6e05731", "_forward in encoder/vilt.py"),
    (vilt.ViltEmbeddings, "visual_embed"): (
        "10c8b1f3be87adde",
        "embed_patches in encoder/patches.py",
    ),
    (vilt.ViltEncoder, "forward"): ("17bbfffd9c7f1e22", "_encode in encoder/vilt.py"),
    (vilt.ViltLayer, "forward"): ("58ab37b6d3974464", "_block in encoder/vilt.py"),
    (vilt.ViltIntermediate, "forward"): ("d60f3781ad76f95d", "_intermediate in encoder/vilt.py"),
    (vilt.ViltOutput, "forward"): ("efce4e7b766ae9a8", "_output in encoder/vilt.py"),
    (vilt.ViltAttention, "forward"): ("2905c84159bc298d", "_attend in encoder/vilt.py"),
    (vilt.ViltSelfAttention, "forward"): (
        "82aebb1693aa0448",
        "_attend in encoder/vilt.py, encoder/joint.py",
    ),
    (GradientCheckpointingLayer, "__init_subclass__"): (
        "bc6216ba47e59dfb",
        "_layer in encoder/vilt.py, encoder/co_attention.py, tower/run.py",
    ),
    (clip.CLIPVisionModel, "forward"): ("7296f6d120808715", "encode in encoder/clip.py"),
    (clip.CLIPEncoder, "forward"): ("477877cceb0ede19", "encode in encoder/clip.py"),
    (siglip.SiglipMultiheadAttentionPoolingHead, "forward"): (
        "5cce51a348d6b482",
        "_attend_to_tokens in tower/alone.py",
    ),
    (siglip2.Siglip2MultiheadAttentionPoolingHead, "forward"): (
        "491c1e634913907e",
        "_pool in tower/alone.py",
    ),
    (bert.BertAttention, "forward"): ("c0e1a7c117338e56", "_attend in encoder/co_attention.py"),
    (bert.BertSelfAttention, "forward"): ("42779e4aff2bbdac", "_attend in encoder/co_attention.py"),
    (bert.BertCrossAttention, "forward"): (
        "867aa213dc901f2a",
        "_attend in encoder/co_attention.py",
    ),
    (bert.BertSelfOutput, "forward"): ("c4cade7c3bed7bea", "_attend in encoder/co_attention.py"),
    (bert.BertIntermediate, "forward"): (
        "d60f3781ad76f95d",
        "_feed_forward in encoder/co_attention.py",
    ),
    (bert.BertOutput, "forward"): ("c4cade7c3bed7bea", "_feed_forward in encoder/co_attention.py"),
    (roberta.RobertaModel, "_create_attention_masks"): (
        "93100ceb4e3a44e6",
        "_encode_text in encoder/meter.py",
    ),
    (bridgetower.BridgeTowerModel, "forward"): (
        "3342ca2581b2c303",
        "_forward in encoder/bridgetower_forward.py",
    ),
    (bridgetower.BridgeTowerResidualAttention, "forward"): (
        "bec0a94ac1d0d3db",
        "run_layer in encoder/bridgetower_tower.py",
    ),
    (bridgetower.BridgeTowerResidualAttention, "attention"): (
        "e0bf7b9574f23721",
        "run_layer in encoder/bridgetower_tower.py",
    ),
    (bridgetower.BridgeTowerVisionTransformer, "forward_post"): (
        "a4ae8f3a34ea0cbb",
        "_normed in encoder/bridgetower_forward.py",
    ),
    (bridgetower.BridgeTowerBertCrossLayer, "forward"): (
        "3b87ba93087449b0",
        "run_text and run_image in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerAttention, "forward"): (
        "c0e1a7c117338e56",
        "_attend in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerSelfAttention, "forward"): (
        "7d7a77b273f20915",
        "_attend in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerCrossAttention, "forward"): (
        "867aa213dc901f2a",
        "_attend in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerSelfOutput, "forward"): (
        "c4cade7c3bed7bea",
        "_attend in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerIntermediate, "forward"): (
        "d60f3781ad76f95d",
        "_feed_forward in encoder/co_attention.py",
    ),
    (bridgetower.BridgeTowerOutput, "forward"): (
        "c4cade7c3bed7bea",
        "_feed_forward in encoder/co_attention.py",
    ),
    (cache_utils.DynamicLayer, "get_seq_length"): (
        "8d1f98494eff50f2",
        "ReducedDynamicLayer in kv_cache.py",
    ),
    (cache_utils.DynamicLayer, "crop"): (
        "b3548264770a5686",
        "ReducedDynamicLayer in kv_cache.py",
    ),
    (cache_utils.DynamicSlidingWindowLayer, "crop"): (
        "2bbc3c01add9a99f",
        "ReducedSlidingLayer in kv_cache.py",
    ),
    (idefics3.Idefics3Model, "inputs_merger"): (
        "65beaa033ba95e55",
        "inputs_merger in decoder/media.py",
    ),
    (transformers.Llama4ForConditionalGeneration, "get_placeholder_mask"): (
        "dc8eb48fa0367d32",
        "placeholder_mask in decoder/media.py and decoder/family.py",
    ),
    (gemma4.Gemma4TextModel, "_maybe_slice_kv_shared_inputs"): (
        "490d479a37d652d9",
        "_unsliced in decoder/gemma4.py",
    ),
    (llama4.Llama4TextAttention, "forward"): ("1c89b14ada6c8891", "_scaled in decoder/llama4.py"),
    (qwen3_vl.Qwen3VLTextModel, "_deepstack_process"): (
        "a78050f93b55c837",
        "deepstack in decoder/media.py",
    ),
    (granite_docling.GraniteDoclingTextModel, "_deepstack_process"): (
        "a78050f93b55c837",
        "deepstack in decoder/media.py",
    ),
    (granite4_vision.Granite4VisionTextModel, "forward"): (
        "def9e11ec96a0243",
        "_keep_planes and _add_plane in decoder/granite_vision.py",
    ),
    (molmo2.Molmo2Adapter, "forward"): (
        "c16c6c4844250db8",
        "vision_facts in decoder/molmo2.py",
    ),
} | {
    (trunk(name), "get_placeholder_mask"): (
        known,
        "placeholder_mask in decoder/media.py and decoder/family.py",
    )
    for known, names in {
        "125a9d7446d62bc2": (
            "Llava InternVL PaliGemma Gemma3 Aria AyaVision Cohere2Vision DeepseekVL "
            "DeepseekVLHybrid FastVlm Fuyu GotOcr2 Janus LightOnOcr Mistral3 Ovis2 QianfanOCR "
            "VipLlava Molmo2"
        ),
        "dc8eb48fa0367d32": (
            "LlavaNext ModernVBert SmolVLM Step3p7 DeepseekOcr2 UnlimitedOcr Granite4Vision"
        ),
        "3b5e8a3ce6008fc9": (
            "LlavaOnevision Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe CohereCompass Cosmos3Edge "
            "Cosmos3Omni Ernie4_5_VLMoe Exaone4_5_ HyperCLOVAXVisionV2 Kimi_K25 "
            "LlavaNextVideo VideoLlama3 MuseGlimmer MuseSpark"
        ),
        "7e4478310f3a85e2": "Qwen2_5OmniThinker Qwen3OmniMoeThinker",
        "220486487c00b9ad": "Glm46V Glm4v Glm4vMoe GlmOcr",
        "8ed63217f08707cf": "PaddleOCRVL",
        "b2666f8fbb6bbeef": "VideoLlava",
        "a4c92bd1beb1f835": "HunYuanVL",
        "c2b5232e33fd2f04": "Chameleon Emu3",
        "a90c598505db2f29": "Apertus1p5",
        "ac9ffc76ece9c637": "Gemma3n",
        "a39fcc62b0e2e68f": "PerceptionLM",
    }.items()
    for name in names.split()
}
STOOD_IN_FOR |= {
    (getattr(module, name), "forward"): (known, "block in tower/run.py and tower/blocks.py")
    for module, name, known in (
        (clip, "CLIPEncoderLayer", "65826d33a2871061"),
        (clip, "CLIPAttention", "124d8a01d30df424"),
        (siglip, "SiglipEncoderLayer", "4fdfce5b54e0fd1b"),
        (siglip, "SiglipAttention", "4f2ed581043ab309"),
        (siglip2, "Siglip2EncoderLayer", "4fdfce5b54e0fd1b"),
        (siglip2, "Siglip2Attention", "4f2ed581043ab309"),
        (vit, "ViTLayer", "ee1765d90f6f1a44"),
        (vit, "ViTAttention", "7d89d69b58129004"),
        (dinov2, "Dinov2Layer", "1ce6d6d7141798a5"),
        (dinov2, "Dinov2Attention", "7d89d69b58129004"),
        (internvl, "InternVLVisionLayer", "ca0ecaeedb9c1eb5"),
        (internvl, "InternVLVisionAttention", "50ae4891cf4d8b7e"),
        (idefics3, "Idefics3EncoderLayer", "fc348ad6a3f4c4a1"),
        (idefics3, "Idefics3VisionAttention", "4f2ed581043ab309"),
        (smolvlm, "SmolVLMEncoderLayer", "4fdfce5b54e0fd1b"),
        (smolvlm, "SmolVLMVisionAttention", "4f2ed581043ab309"),
        (pixtral, "PixtralAttentionLayer", "9eca5e46182eb085"),
        (pixtral, "PixtralAttention", "0822075976911ad5"),
        (qwen2_vl, "Qwen2VLVisionBlock", "10e6d816b37b9d02"),
        (qwen2_vl, "VisionAttention", "ae6fe90b254c7c8e"),
        (qwen2_5_vl, "Qwen2_5_VLVisionBlock", "5e660f9e9fddcd08"),
        (qwen2_5_vl, "Qwen2_5_VLVisionAttention", "ae6fe90b254c7c8e"),
        (qwen3_vl, "Qwen3VLVisionBlock", "5e660f9e9fddcd08"),
        (qwen3_vl, "Qwen3VLVisionAttention", "ae6fe90b254c7c8e"),
    )
}


def fingerprint(function):
    """A hash of a function's source without docstring and blank lines."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, first = source.splitlines(), ast.parse(source).body[0].body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        del lines[first.lineno - 1 : first.end_lineno]
    return hashlib.sha256("\n".join(line for line in lines if line.strip()).encode()).hexdigest()[
        :16
    ]


@pytest.mark.skipif(
    f"transformers=={transformers.__version__}" not in PINS,
    reason="not the version that constraints.txt pins",
)
@pytest.mark.parametrize(
    ("kind", "method"), STOOD_IN_FOR, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_method_is_the_one_we_know(kind, method):
    known, ours = STOOD_IN_FOR[kind, method]
    found = fingerprint(getattr(kind, method))
    assert found == known, (
        f"{kind.__module__}.{kind.__name__}.{method} changed in transformers "
        f"{transformers.__version__}. Read it and "
        f"compare it with {ours}, which stands in for it; when that does the same again, put "
        f"{found!r} here"
    )


def test_the_fingerprint_is_of_the_code():
    def documented(x):
        """Says something."""

        return x + 1

    def changed(x):
        return x + 2

    first, second = fingerprint(documented), fingerprint(changed)
    del documented, changed

    def documented(x):
        return x + 1

    assert fingerprint(documented) == first != second
