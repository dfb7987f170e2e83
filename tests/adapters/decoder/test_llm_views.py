"""What a reducer is shown of a decoder, what a plan does to it, and what the host has to wait
for."""

import math

import oracle_llm
import pytest
import tiny_llm
import torch
from tiny_llm import logits
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import pumer
from pumer import PuMer, Random, Reducer, V2Drop
from pumer.adapters import find
from pumer.reducers import FastV, Plan, Tokens
from pumer.reducers.base import Traits

NEEDS = frozenset({"features_BND", "received_BN", "keys_BNC", "queries_BNC"})
MIDDLE = frozenset({"middle_received_BN"})
CLASS = "class_attention_BN"


@pytest.fixture(scope="module", params=tiny_llm.BUILDERS)
def family(request):
    return request.param


class Spy(Reducer):
    """Reduces nothing and keeps what it was shown."""

    name = "spy"

    def __init__(self, layers=(-1, 1), needs=frozenset()):
        object.__setattr__(self, "at", layers)
        object.__setattr__(self, "asks", needs)
        object.__setattr__(self, "shown", [])
        object.__setattr__(self, "middle_layer", None)

    @property
    def layers(self):
        return self.at

    @property
    def traits(self):
        return Traits(needs_encoder=self.asks, middle_layer=self.middle_layer)

    def resolve(self, model):
        object.__setattr__(self, "middle_layer", model.encoder_layers[0])
        return self

    def lengths(self, shape):
        return shape.unchanged

    def plan(self, tokens):
        self.shown.append(tokens)
        return Plan.identity(tokens.mask_BN)


def shown(model, inputs, **settings) -> list[Tokens]:
    spy = Spy(**settings)
    with pumer.reduced(model, spy), torch.no_grad():
        model(**inputs)
    return spy.shown


def test_every_image_is_a_row_before_the_first_layer(family):
    model = tiny_llm.model(family)
    layout = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
    inputs = tiny_llm.batch(family, layout)
    before, inside = shown(model, inputs)
    patches = tiny_llm.patches(family, 3)
    assert before.valid_BN[:, before.image].sum(1).tolist() == patches
    assert inside.valid_BN[:, inside.image].sum(1).tolist() == [
        patches[0],
        patches[1] + patches[2],
        0,
    ]
    # Text is what is neither image nor structure nor padding, and the sample without an image is
    # left alone.
    assert before.valid_BN[:, : before.text].sum(1).tolist() == [11, 8, 8]
    assert inside.valid_BN[:, : inside.text].sum(1).tolist() == [11, 8, 0]
    assert before.num_prefix_tokens == inside.num_prefix_tokens == 0


def test_tower_facts(family):
    """What the vision tower says of an image's tokens is what its own eager attention says."""
    model = tiny_llm.model(family)
    towers = {"llava", "llava_next", "internvl"}
    needs = NEEDS | MIDDLE | ({CLASS} if family in towers else frozenset())
    if family not in towers:
        with pytest.raises(ValueError, match=r"no \[CLS\]"):
            pumer.apply(model, Spy(layers=(-1,), needs=NEEDS | {CLASS}))
    inputs = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2)))
    (tokens,) = shown(model, inputs, layers=(-1,), needs=needs)
    rows, count = tokens.mask_BN.shape[0], tokens.mask_BN.shape[1] - tokens.text
    assert {getattr(tokens.encoder, name).shape[:2] for name in needs} == {(rows, count)}
    # Images by themselves give the same rows.
    for row, layout in enumerate((((4, "i", 6),), None)):
        if layout is None:
            continue
        (one,) = shown(model, tiny_llm.batch(family, layout), layers=(-1,), needs=needs)
        for name in needs:
            alone = getattr(one.encoder, name)
            torch.testing.assert_close(
                getattr(tokens.encoder, name)[row : row + 1, : alone.shape[1]],
                alone,
                rtol=1e-4,
                atol=1e-5,
            )
    if family in ("llava", "paligemma"):
        facts = eager_facts(family, inputs["pixel_values"])
        for name in needs & set(facts):
            torch.testing.assert_close(
                getattr(tokens.encoder, name), facts[name], rtol=1e-4, atol=1e-5
            )


def eager_facts(family, pixels):
    """The same from the tower's whole attention maps."""
    trunk = tiny_llm.model(family, "eager").model
    index = {"llava": -2, "paligemma": -1}[family]
    with torch.no_grad():
        output = trunk.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    attention, middle = (output.attentions[layer].mean(1) for layer in (index, 0))
    if family == "llava":
        features = output.hidden_states[-2][:, 1:]
        return {
            "features_BND": features,
            CLASS: attention[:, 0, 1:],
            "received_BN": attention.mean(1)[:, 1:],
            "middle_received_BN": middle.mean(1)[:, 1:],
        }
    return {
        "features_BND": output.last_hidden_state,
        "received_BN": attention.mean(1),
        "middle_received_BN": middle.mean(1),
    }


def test_scores_come_from_the_attention_of_the_layer(family):
    """FastV keeps what the last row of the layer's own eager attention map says."""
    model = tiny_llm.model(family, "eager")
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    reducer = FastV(keep=0.5, layer=2)
    with pumer.reduced(model, reducer):
        marks = oracle_llm.kept(model, inputs)
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[1]
    image = tiny_llm.candidates(family, inputs)[0]
    row = attention[0, :, -1].mean(0)
    best = row.masked_fill(~image, -1).topk(round(image.sum().item() * 0.5)).indices
    expected = ~image
    expected[best] = True
    assert torch.equal(marks[2][0], expected)


def test_what_a_layer_changes(family):
    """V2Drop compares the states that two layers of the stock model are given.

    Neither queries nor keys are looked at, and what earlier stages dropped is gone from both.
    """
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    shown = []

    class Watched(V2Drop):
        def plan(self, tokens):
            shown.append(tokens)
            return super().plan(tokens)

    layers, states = find(model).layers(model), []

    def look(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    logits(model, inputs)
    for handle in handles:
        handle.remove()

    def looked_into():
        return ["config" in vars(layer.self_attn.config) for layer in layers]

    with pumer.reduced(model, FastV(layer=1)):
        assert any(looked_into())
    with pumer.reduced(model, Watched(keep=(0.5, 0.5), layers=(0, 1))):
        assert not any(looked_into())
        logits(model, inputs)
    first, second = shown
    assert first.queries_BHNC is None
    image = tiny_llm.candidates(family, inputs)[0]
    torch.testing.assert_close(first.input_BND[0, first.image], states[0][0, image])
    torch.testing.assert_close(first.states_BND[0, first.image], states[1][0, image])
    change = (states[1] - states[0])[0, image].norm(dim=1)
    kept = change.topk(len(change) // 2).indices.sort().values
    torch.testing.assert_close(
        second.input_BND[0, second.image], states[1][0, image][kept], rtol=1e-4, atol=1e-5
    )


def test_merging_is_the_reference_loop():
    """PuMer in a decoder, sample by sample and token by token, in plain Python."""
    model = tiny_llm.model("llava", "eager")
    layout = ((7, "i", 6), (4, "i", 3, "i", 5))
    reducer = PuMer(prune=0.25, merge=0.25, merge_text=0.4, layers=(1,))
    batch = tiny_llm.batch("llava", layout)
    with pumer.reduced(model, reducer), torch.no_grad():
        reduced = model(**batch, use_cache=False).logits
    for row in range(len(layout)):
        expected = merged_by_hand(model, tiny_llm.alone("llava", layout, row), reducer)
        torch.testing.assert_close(reduced[row, -1], expected, rtol=1e-4, atol=1e-4)


def merged_by_hand(model, inputs, reducer):
    trunk, language = model.model, model.model.language_model
    ids = inputs["input_ids"][0].tolist()
    image = [place for place, token in enumerate(ids) if token == tiny_llm.IMAGE]
    text = [place for place, token in enumerate(ids) if token != tiny_llm.IMAGE]
    facts = {}

    def look(module, args, kwargs):
        facts["normed"] = kwargs["hidden_states"]

    handle = language.layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        features = torch.cat(trunk.get_image_features(inputs["pixel_values"]).pooler_output)
        states = trunk.get_input_embeddings()(inputs["input_ids"])
        states[0, image] = features
        output = language(
            inputs_embeds=states, output_hidden_states=True, output_attentions=True, use_cache=False
        )
    handle.remove()
    hidden, attention = output.hidden_states[2][0], output.attentions[1][0].mean(0)
    cos, sin = language.rotary_emb(states, torch.arange(len(ids))[None])
    layer = language.layers[1].self_attn
    keys = layer.k_proj(facts["normed"]).unflatten(-1, (-1, 8)).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
    keys = keys.mean(1)[0].detach()

    saliency = {place: sum(attention[row, place].item() for row in text) for place in image}
    kept_count = len(image) - round(reducer.prune * len(image))
    kept = sorted(sorted(image, key=lambda place: (-saliency[place], place))[:kept_count])
    merges = round((reducer.prune + reducer.merge) * len(image)) - round(reducer.prune * len(image))
    groups = matched(kept, keys, min(merges, len(kept) // 2))
    inner = text[1:-1]
    inner_merges = min(round(reducer.merge_text * len(inner)), len(inner) // 2)
    groups += [[text[0]], [text[-1]], *matched(inner, keys, inner_merges)]
    groups = sorted(groups, key=min)

    left = torch.stack([hidden[group].mean(0) for group in groups])[None]
    places = torch.tensor([[min(group) for group in groups]])
    rotary = language.rotary_emb(left, places)
    count = len(groups)
    causal = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        for number in range(2, tiny_llm.LAYERS):
            left = language.layers[number](left, attention_mask=causal, position_embeddings=rotary)
        return model.lm_head(language.norm(left))[0, -1]


def matched(places, keys, merges):
    """Bipartite matching: places in groups."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    odd = places[1::2]
    best = (
        {a: max(odd, key=lambda b, a=a: (unit[a] @ unit[b]).item()) for a in places[::2]}
        if odd
        else {}
    )
    order = sorted(best, key=lambda a: -(unit[a] @ unit[best[a]]).item())[:merges]
    groups = {place: [place] for place in places if place not in order}
    for place in order:
        groups[best[place]].append(place)
    return list(groups.values())


def test_sizes_sum_to_the_source_count(family):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2)))
    merging = PuMer(prune=0, merge=0.4, merge_text=0.3, layers=(0,))
    with pumer.reduced(model, merging), pumer.trace(model) as steps, torch.no_grad():
        model(**inputs)
    plan = steps[0].plan
    whole = (plan.slot_BN >= 0).float()
    assert torch.equal(plan.total(whole).sum(1), whole.sum(1))


class OnDevice(torch.Tensor):
    """Stands for a tensor on a device, as does all that is computed from it; counts what makes the
    host wait for it."""

    count = 0
    READS = (
        "item",
        "tolist",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "masked_select",
    )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in cls.READS or (name in ("__getitem__", "__setitem__") and cls.picks(args[1])):
            cls.count += 1
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if name == "cpu" else result

    @staticmethod
    def picks(index):
        """Whether an index is a mask, whose length the host has to know."""
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def waits(model, inputs):
    OnDevice.count = 0
    with torch.no_grad():
        model(**{name: x.as_subclass(OnDevice) for name, x in inputs.items()})
    return OnDevice.count


@pytest.mark.parametrize(
    "reducer",
    [Random(prune=0.5), FastV(keep=0.5, layer=2), PuMer(0.2, 0.2, 0.2, layers=(0, 1))],
    ids=lambda r: r.name,
)
def test_the_host_waits_no_more_than_before(family, reducer):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2)))
    stock = waits(model, inputs)
    assert stock > 0
    with pumer.reduced(model, reducer):
        assert waits(model, inputs) <= stock


def test_report(family):
    model = tiny_llm.model(family)
    inputs = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2), (5,)))
    pumer.apply(model, FastV(keep=0.5, layer=2))
    with torch.no_grad():
        model(**inputs)
    report = pumer.report(model)
    assert report.active, report.state
    assert (
        report.cache_bytes < report.base_cache_bytes or family == "gemma3"
    )  # whose later layers forget anyway
    assert report.macs < report.base_macs
    assert 0 < report.saved(1) < 1
    assert "cache after the prompt" in str(report)
    assert math.isfinite(report.to_dict()["decode_macs"])


def test_how_long_a_saving_matters():
    """The longest answer with that share saved, found by trying all."""
    report = pumer.report(pumer.apply(tiny_llm.model("llava"), FastV(keep=0.1, layer=1)))
    for share, balance in ((0.05, 0.0), (0.1, 0.0), (0.05, 20.0), (0.9, 0.0)):
        longest = max(
            (tokens for tokens in range(1, 3000) if report.saved(tokens, balance) >= share),
            default=0,
        )
        found = report.matters_until(share, balance)
        assert longest == (2999 if found is None else found)
