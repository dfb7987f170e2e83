"""Every way a decoder is called, and every tower it may have: a reducer sees the same, or says why
it cannot."""

import oracle_llm
import pytest
import tiny
import tiny_llm
import torch
import transformers
from tiny_llm import CACHE, IMAGE, logits, near
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pumer
from pumer import DivPrune, FasterVLM, FoPru, Pool, PuMer, Random, SparseVLM
from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder import view as decoder_view
from pumer.adapters.decoder import vision as decoder_vision
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.reducers import FastV, Tokens
from pumer.reducers.ops.saliency import text_attention
from pumer.reducers.tokens import Encoder

LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2))
RECEIVED = FasterVLM(keep=4, saliency="received")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def llava():
    return tiny_llm.model("llava")


def kept(model, inputs, **more):
    """Which of its tokens the last row keeps at the first reduction, [N]."""
    with pumer.trace(model) as steps, torch.no_grad():
        model(**inputs, **more)
    return steps[0].plan.slot_BN[-1] >= 0


# --- vision towers ---


def with_tower(vision, strategy, attention="sdpa"):
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**tiny_llm.TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.vision_tower.parameters():
        parameter.data.mul_(5)
    model.set_attn_implementation(attention)
    return model


def of_tokens(count):
    """A batch whose images take so many placeholders each."""
    inputs = tiny_llm.batch("llava", LAYOUT)
    rows = []
    for row in inputs["input_ids"].tolist():
        runs = "".join("i" if token == IMAGE else "t" for token in row).split("i" * 16)
        texts = iter(token for token in row if token != IMAGE)
        parts = [[next(texts) for _ in run] for run in runs]
        rows.append([token for part in parts for token in [IMAGE] * count + part][count:])
    longest = max(map(len, rows))
    ids = torch.tensor([[tiny_llm.PAD] * (longest - len(row)) + row for row in rows])
    return inputs | {"input_ids": ids, "attention_mask": (ids != tiny_llm.PAD).long()}


CLIP, SIGLIP = (
    transformers.CLIPVisionConfig(**tiny_llm.CLIP),
    transformers.SiglipVisionConfig(**tiny_llm.SIGLIP),
)


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens", "patches"),
    [
        (CLIP, "default", 16, 16),
        (CLIP, "full", 17, 16),
        (SIGLIP, "full", 16, 16),
        (SIGLIP, "default", 15, 15),
    ],
)
def test_patches_of_every_tower(vision, strategy, tokens, patches):
    """What is no patch stays, and what the tower knows of patches is what its eager attention says
    of them."""
    model, inputs = with_tower(vision, strategy, "eager"), of_tokens(tokens)
    with torch.no_grad():
        output = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    received = output.attentions[-1].mean((1, 2))[-1, -patches:]
    with pumer.reduced(model, RECEIVED):
        chosen = kept(model, inputs)[-patches:]
        assert pumer.active(model).lengths[-1] == (8, 8)
        assert pumer.active(model).entry[1] == 2 * patches  # of the row with two images
    assert chosen.nonzero().flatten().tolist() == received.topk(4).indices.sort().values.tolist()


@pytest.mark.parametrize("reducer", [Pool(), FoPru(keep=0.5, strategy="row")])
def test_methods_that_go_by_place_need_the_whole_grid(reducer):
    for vision, strategy, tokens in ((CLIP, "full", 17), (SIGLIP, "full", 16)):
        model = with_tower(vision, strategy)
        with pumer.reduced(model, reducer):
            logits(model, of_tokens(tokens))
            assert pumer.report(model).active
    model = with_tower(SIGLIP, "default")  # drops a patch
    with pumer.reduced(model, reducer), pytest.raises(ValueError, match="all patches"):
        logits(model, of_tokens(15))


def test_only_clip_has_a_class_token():
    with pytest.raises(ValueError, match=r"has no \[CLS\]"):
        pumer.apply(with_tower(SIGLIP, "full"), FasterVLM())
    with pumer.reduced(with_tower(CLIP, "full"), FasterVLM(keep=4)) as model:
        assert kept(model, of_tokens(17))[-16:].sum() == 4


def test_towers_that_are_not_known_are_refused():
    sizes = {name: tiny_llm.SIGLIP[name] for name in tiny_llm.SIDES}
    model = with_tower(transformers.ViTConfig(**sizes), "full")
    for reducer in (FastV(keep=0.5, layer=1), DivPrune(keep=0.5)):
        with pytest.raises(
            ValueError,
            match=r"ViTModel.*expected one of CLIPVisionModel, SiglipVisionModel",
        ):
            pumer.apply(model, reducer)
        assert pumer.active(model) is None


# --- what is seen of the tower ---


class Largest(TorchFunctionMode):
    """Notes the size of the largest tensor made."""

    size = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.numel())
        return made


def test_received_attention_is_added_up_in_parts(monkeypatch):
    monkeypatch.setattr(decoder_vision, "AT_ONCE", 3)
    queries, keys = torch.randn(2, 2, 3, 20, 2, generator=torch.Generator().manual_seed(0))
    whole = (queries @ keys.transpose(2, 3) / 2**0.5).softmax(-1).mean((1, 2))
    with Largest() as largest:
        known = decoder_vision.attention_of(frozenset({"received_BN"}), queries, keys, first=True)
    torch.testing.assert_close(known["received_BN"], whole[:, 1:], rtol=0, atol=1e-6)
    assert largest.size == 2 * 3 * 3 * 20


@pytest.mark.parametrize("family", QWEN)
def test_what_is_seen_of_a_video_is_forgotten(family):
    model, image = tiny_llm.model(family), tiny_llm.batch(family, ((4, "i", 6),))
    with pumer.reduced(model, RECEIVED):
        fresh = kept(model, image)
        logits(model, with_video(family, tiny_llm.batch(family, ((3,),))))
        assert torch.equal(kept(model, image), fresh)


@pytest.mark.parametrize("family", QWEN)
def test_what_checkpointing_computes_again_is_forgotten(family):
    model = tiny_llm.model(family).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    first, second = (tiny_llm.batch(family, ((4, "i", 6),), seed=seed) for seed in (3, 9))
    with pumer.reduced(model, RECEIVED):
        fresh = kept(model, second, use_cache=False)
        model(**first, labels=first["input_ids"], use_cache=False).loss.backward()
        assert torch.equal(kept(model, second, use_cache=False), fresh)


def with_video(family, inputs):
    """A video of two frames behind the prompt."""
    frame = [51, *[58] * 4, 52]
    tail = torch.tensor(
        [[*frame, *frame, 7, 8] if family == "qwen3_vl" else [51, *[58] * 8, 52, 7, 8]]
    )
    ids = torch.cat([inputs["input_ids"], tail], 1)
    return inputs | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == 58).int(),
        "pixel_values_videos": torch.randn(32, 48, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


@pytest.mark.parametrize("family", QWEN)
def test_an_image_and_a_video_in_one_prompt(family):
    model, inputs = (
        tiny_llm.model(family),
        with_video(family, tiny_llm.batch(family, ((4, "i", 6),))),
    )
    with pumer.reduced(model, Random(prune=0.5)):
        marks, reduced = oracle_llm.kept(model, inputs), logits(model, inputs)
        assert pumer.active(model).lengths[-1][1] == 3
    with oracle_llm.masked(model, marks):
        near(reduced[:, -1], logits(model, inputs)[:, -1])


def test_facts_follow_the_language_model_to_its_device():
    """As where `device_map` has put the tower elsewhere."""
    facts = Encoder(received_BN=torch.rand(1, 4), keys_BNC=torch.rand(1, 4, 2))
    for images in ([ImageSpan(4, encoder=facts)], [ImageSpan(4, encoder=facts)] * 2):
        found = decoder_view._row_encoders(images, torch.device("meta"))
        assert {found.received_BN.device.type, found.keys_BNC.device.type} == {"meta"}


# --- calls ---


def test_forward_is_as_good_as_a_call(llava):
    """PEFT calls `forward` itself; the answer must not guide what is kept there either."""
    inputs = tiny_llm.batch("llava", ((4, "i", 9),))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    losses, texts = [], []
    with pumer.reduced(llava, PuMer(0.5, 0.2, 0.3, layers=(0,))), torch.no_grad():
        for call in (llava, llava.forward):
            with pumer.trace(llava) as steps:
                losses.append(call(**inputs, labels=labels).loss)
            texts.append(steps[0].text)
        assert llava(**inputs).logits.shape[1] == labels.shape[1]
    assert texts == [1 + 4 + 5] * 2
    assert torch.equal(*losses)


def test_images_encoded_earlier(llava):
    a, b = (tiny_llm.batch("llava", ((4, "i", 6),), seed=seed) for seed in (3, 9))
    text = {name: a[name] for name in ("input_ids", "attention_mask")}
    with pumer.reduced(llava, FasterVLM(keep=4)), torch.no_grad():
        first, second = (
            llava.get_image_features(one["pixel_values"], return_dict=True) for one in (a, b)
        )
        for features, fresh in ((first, a), (second, b)):
            given = kept(llava, text, mm_encoder_outputs={"image": features})
            assert torch.equal(given, kept(llava, fresh))
        rebuilt = BaseModelOutputWithPooling(**second)
        assert torch.equal(kept(llava, text, mm_encoder_outputs={"image": rebuilt}), kept(llava, b))
        moved = BaseModelOutputWithPooling(
            pooler_output=[features.clone() for features in second.pooler_output]
        )
        assert torch.equal(kept(llava, text, mm_encoder_outputs={"image": moved}), kept(llava, b))
        unknown = BaseModelOutputWithPooling(
            pooler_output=[features + 1 for features in first.pooler_output]
        )
        with pytest.raises(ValueError, match="mm_encoder_outputs"):
            llava(**text, mm_encoder_outputs={"image": unknown})
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            tiny_llm.answer(llava, a, prefill_chunk_size=8)
        tiny_llm.answer(llava, a)  # and it goes on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(llava, dtype):
    """Reducers plan in the precision they ask for, and what is kept has its gradients."""
    inputs = tiny_llm.batch("llava", LAYOUT)
    with (
        pumer.reduced(llava, SparseVLM(keep=(6, 4), layers=(0, 1))),
        torch.autocast("cpu", dtype=dtype),
    ):
        llava(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    grads = [layer.mlp.up_proj.weight.grad for layer in llava.model.language_model.layers]
    grads.append(llava.model.multi_modal_projector.linear_1.weight.grad)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    llava.zero_grad()


def test_no_reducer_is_asked_under_autocast(llava, monkeypatch):
    states = []

    def listen(owner, name):
        stock = getattr(owner, name)

        def asked(*args, **kwargs):
            states.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, asked)

    listen(decoder_vision, "attention_of")
    listen(FasterVLM, "plan")
    listen(Random, "plan")
    family = tiny.FAMILIES["ViLT"]
    for model, inputs, reducer in (
        (llava, tiny_llm.batch("llava", LAYOUT), FasterVLM(keep=4)),
        (tiny.model(family), tiny.batch(family), Random(prune=0.3, layers=(0, 1))),
    ):
        states.clear()
        with pumer.reduced(model, reducer), torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs)
        assert states == [(False, False)] * 2


def flash(module, query, key, value, attention_mask, **kwargs):
    """Stands for flash attention of one sample without padding, and notes what it would look at."""
    SEEN.append((kwargs.get("position_ids"), attention_mask))
    shape = query.shape[2], key.shape[2]
    causal = torch.ones(shape).tril(shape[1] - shape[0]).bool()
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, causal, scale=module.scaling
    )
    return attended.transpose(1, 2), None


SEEN = []


def test_flash_attention_does_not_take_gaps_for_packed_sequences(llava, monkeypatch):
    both = tiny_llm.batch("llava", ((4, "i", 6, "i", 3),))
    ids, pixels, cut = both["input_ids"], both["pixel_values"], 1 + 4 + 16 + 6
    reducer = Random(prune=0.5, layers=(-1, 1))

    def turns(model):
        with pumer.reduced(model, reducer), torch.no_grad():
            cache = kv_cache.find(model(input_ids=ids[:, :cut], pixel_values=pixels[:1]))
            return model(input_ids=ids[:, cut:], pixel_values=pixels[1:], **{CACHE: cache}).logits[
                :, -3:
            ]

    expected = turns(llava)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    assert "flash_attention_2" in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    monkeypatch.setattr(
        llava.model.language_model.config, "_attn_implementation_internal", "flash_attention_2"
    )
    SEEN.clear()
    near(turns(llava), expected)
    assert len(SEEN) == 2 * tiny_llm.LAYERS
    assert not any(_is_packed_sequence(positions, 1) for positions, _ in SEEN)
    assert all(mask is None for _, mask in SEEN)


# --- scores ---


def test_half_precision_holds_the_scores():
    """Products of queries and keys that are too large for it until they are scaled."""
    queries, keys = torch.randn(2, 1, 1, 6, 64, generator=torch.Generator().manual_seed(0)) + 36
    assert (queries.half() @ keys.half().transpose(2, 3)).isinf().any()
    needs = frozenset({"received_BN", "class_attention_BN"})
    known = decoder_vision.attention_of(needs, queries.half(), keys.half(), first=True)
    assert all(known[name].isfinite().all() for name in needs)

    ones = torch.ones(1, 6)
    tokens = Tokens(ones.bool(), 2, ones, queries_BHNC=queries.half(), keys_BHNC=keys.half())
    assert text_attention(tokens).isfinite().all()


def test_an_image_behind_all_text_is_rated_by_its_last_token():
    """The text before it has not seen it: the last row of the map is the image's own."""
    model, inputs = tiny_llm.model("llava", "eager"), tiny_llm.batch("llava", ((6, "i"),))
    with pumer.reduced(model, FastV(keep=4, layer=2)):
        marks = oracle_llm.kept(model, inputs)
    with torch.no_grad():
        row = model(**inputs, output_attentions=True).attentions[1][0, :, -1].mean(0)
    image = inputs["input_ids"][0] == IMAGE
    best = row.masked_fill(~image, -1).topk(4).indices.sort().values
    assert (marks[2][0] & image).nonzero().flatten().tolist() == best.tolist()
