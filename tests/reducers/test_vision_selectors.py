"""Methods that choose by the vision encoder: worked cases of their published code, and their
edges."""

from dataclasses import replace

import pytest
import torch
from parity_vision import kept, of_images, stand_by_themselves
from pictures import GRIDS, batch

from pumer.reducers import (
    EMBEDDINGS,
    SCOPE,
    CDPruner,
    Chain,
    Compose,
    DivPrune,
    Encoder,
    Energy,
    EnergyCalibrator,
    FasterVLM,
    FoPru,
    HiPrune,
    HoloV,
    MMTok,
    PruMerge,
    PyramidDrop,
    SVDPrune,
    TokenShape,
    VisionZip,
    VisPruner,
)
from pumer.reducers.cdpruner import WORDS_AT_ONCE, mean_direction
from pumer.reducers.ops.matching import unit_vectors

REDUCERS = {
    "cdpruner": CDPruner(keep=0.4),
    "cdpruner-relevant": CDPruner(keep=4, theta=0.9999, inverted=True),
    "divprune": DivPrune(keep=0.4),
    "energy": Energy(DivPrune(), tau=0.9, least=2),
    "energy-prumerge": Energy(PruMerge(keep=3), tau=0.9, least=2),
    "fastervlm": FasterVLM(keep=0.4),
    "fopru": FoPru(keep=0.4, saliency="variance"),
    "fopru-row": FoPru(keep=5, strategy="row"),
    "fopru-rows": FoPru(keep=0.4, strategy="row", fill=False),
    "hiprune": HiPrune(keep=0.4, alpha=0.5, object_layer=1),
    "hiprune-again": HiPrune(keep=0.4, alpha=0.5, object_layer=1, penalty=1.0),
    "holov": HoloV(keep=0.4),
    "holov-auto": HoloV(keep=6, chunks="auto"),
    "mmtok": MMTok(keep=0.4),
    "mmtok-count": MMTok(keep=6, alpha=2.0),
    "prumerge": PruMerge(plus=False),
    "prumerge-plus": PruMerge(),
    "prumerge-fixed": PruMerge(keep=0.4),
    "scope": SCOPE(keep=0.4),
    "scope-added": SCOPE(keep=0.4, combine="add", alpha=9.0),
    "svd-prune": SVDPrune(keep=0.4, center=True),
    "svd-prune-mass": SVDPrune(keep=5, mass=0.3, features="states", normalize=True),
    "visionzip": VisionZip(keep=0.4),
    "visionzip-count": VisionZip(keep=6, contextual=4),
    "vispruner": VisPruner(keep=0.4),
}
every = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)


def noise(*shape):
    return torch.randn(*shape)


# --- worked cases of the published code ---


def test_vispruner_removes_duplicates_from_the_most_similar_on():
    torch.manual_seed(0)
    features, attention = noise(1, 64, 16), noise(1, 64).mul(2).softmax(-1)
    encoder = Encoder(features_BND=features, class_attention_BN=attention)
    plan = VisPruner(keep=16).plan(of_images(features, encoder))
    assert kept(plan) == [0, 6, 9, 12, 13, 14, 17, 22, 24, 27, 37, 40, 41, 44, 58, 61]
    by_attention = VisPruner(keep=8, important=1.0).plan(of_images(features, encoder))
    assert kept(by_attention) == [6, 13, 14, 17, 22, 37, 40, 41]


def test_holov_gives_the_first_chunks_what_does_not_divide():
    torch.manual_seed(0)
    features, attention = noise(1, 60, 64), noise(60).softmax(-1)[None]
    tokens = of_images(features, Encoder(class_attention_BN=attention))
    found = kept(HoloV(keep=16).plan(tokens))
    assert found == [5, 17, 20, 22, 29, 36, 37, 38, 39, 40, 43, 51, 52, 53, 57, 59]
    assert 51 in found
    assert 54 not in found


@pytest.mark.parametrize(("count", "keep", "chunks"), [(576, 64, 16), (1196, 100, 21), (60, 60, 1)])
def test_holov_has_the_number_of_chunks_published_for_qwen(count, keep, chunks):
    attention = torch.rand(1, count).square()
    tokens = of_images(noise(1, count, 8), Encoder(class_attention_BN=attention))
    auto, fixed = HoloV(keep=keep, chunks="auto"), HoloV(keep=keep, chunks=chunks)
    assert kept(auto.plan(tokens)) == kept(fixed.plan(tokens))


def test_scope_covers_what_the_encoder_puts_out():
    torch.manual_seed(0)
    features, weight = noise(1, 64, 24), noise(24, 48)
    states = torch.nn.functional.gelu(features @ weight / 5) @ noise(48, 32)
    attention = noise(1, 64).softmax(-1)
    encoder = Encoder(features_BND=features, class_attention_BN=attention)
    expected = [0, 2, 7, 10, 11, 15, 17, 20, 21, 27, 30, 34, 40, 46, 52, 56]
    assert kept(SCOPE(keep=16).plan(of_images(states, encoder))) == expected
    # Where the encoder says nothing of its output: what the language model is given.
    without = replace(encoder, features_BND=None)
    assert kept(SCOPE(keep=16).plan(of_images(features, without))) == expected


def test_prumerge_moves_what_it_keeps():
    torch.manual_seed(0)
    features, queries, keys = noise(1, 65, 32), noise(1, 65, 32), noise(1, 65, 32)
    keys[:, [5, 20, 33, 50]] += queries[:, :1]
    attention = (queries[:, :1] @ keys.transpose(1, 2) * 32**-0.5).softmax(-1)[:, 0, 1:]
    encoder = Encoder(last_class_attention_BN=attention, last_keys_BNC=keys[:, 1:])
    features = features[:, 1:]
    plan = PruMerge(plus=False).plan(of_images(features, encoder))
    expected = torch.tensor([4, 19, 20, 24, 32, 39, 47, 49])
    stand_by_themselves(plan, expected)
    merged = plan.reduce(features)[0, :8]
    moved = (merged - features[0, expected]).norm(dim=1) / features[0, expected].norm(dim=1)
    assert round(100 * float(moved.min())) == 23
    assert round(100 * float(moved.max())) == 50


# --- where published code has something to read ---


def test_who_has_a_budget_for_each_crop():
    crops = {name for name, reducer in REDUCERS.items() if reducer.traits.per_crop}
    assert {name.split("-")[0] for name in crops} == {
        "cdpruner",
        "fastervlm",
        "hiprune",
        "scope",
        "visionzip",
        "vispruner",
    }
    for wrapped in (Energy(VisionZip()), Chain((VisionZip(),)), Compose(inside=VisionZip())):
        assert wrapped.traits.per_crop
    assert Chain((VisionZip(),)).traits.before_projector
    assert not Energy(VisionZip()).traits.before_projector  # its budget needs what comes behind
    assert not Chain((DivPrune(), PyramidDrop())).traits.per_crop
    assert {name for name, r in REDUCERS.items() if r.traits.before_projector} == {
        "visionzip",
        "visionzip-count",
    }


def test_words_are_read_in_parts():
    count = WORDS_AT_ONCE + 9
    text, words = noise(2, count, 6), torch.arange(count) < torch.tensor([[count], [5]])
    text[0, 3] = torch.nan
    text[1, 5:] = torch.inf
    found = mean_direction(text, words)
    expected = unit_vectors(text, torch.float64)
    torch.testing.assert_close(found[0], expected[0, [0, 1, 2, *range(4, count)]].sum(0) / count)
    torch.testing.assert_close(found[1], expected[1, :5].mean(0))


# --- edges ---


def changed(tokens, change):
    """The tokens with every feature and every attention changed."""
    encoder = Encoder(**{name: change(value) for name, value in vars(tokens.encoder).items()})
    return replace(tokens, states_BND=change(tokens.states_BND), encoder=encoder)


def holds(reducer, plan, tokens):
    """What a plan for padded rows promises, whatever the values."""
    text, count = tokens.text, tokens.mask_BN.shape[1]
    _, most = reducer.lengths(TokenShape(text, count - text, EMBEDDINGS, 0, tokens.grid))
    assert plan.slots == text + most
    assert int(plan.slot_BN.min()) >= -1
    assert int(plan.slot_BN.max()) < plan.slots
    if plan.index_BK is not None:
        assert 0 <= int(plan.index_BK.min()) <= int(plan.index_BK.max()) < count
    real_BKN = plan.sources() & tokens.mask_BN[:, None]
    assert torch.equal(real_BKN.any(2), plan.mask_BK)
    assert torch.equal(plan.sources() & plan.mask_BK[..., None], real_BKN)
    filled_B, real_B = plan.mask_BK[:, text:].sum(1), tokens.mask_BN[:, text:].sum(1)
    assert torch.equal(filled_B > 0, real_B > 0)
    if not reducer.traits.dynamic_length:
        promised = [reducer.lengths(TokenShape(text, int(n), EMBEDDINGS, 0))[1] for n in real_B]
        assert filled_B.tolist() == promised
    # Padding adds to no merged token.
    if plan.shares_BKN is not None:
        shares = plan.shares_BKN[:, text:, text:] * ~tokens.mask_BN[:, None, text:]
        assert not shares.any()


def set_row(value):
    def change(x):
        x = x.clone()
        x[0] = value
        return x

    return change


def set_tokens(value):
    """Some tokens of the first row, the first of its image among them."""

    def change(x):
        x = x.clone()
        x[0, [0, 3, 12]] = value
        return x

    return change


@every
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [set_row, set_tokens])
def test_what_is_not_finite_stays_in_its_sample(reducer, value, where):
    tokens = batch(0)
    plan = reducer.plan(tokens)
    poisoned = changed(tokens, where(value))
    found = reducer.plan(poisoned)
    holds(reducer, found, tokens)
    reduced, expected = found.reduce(poisoned.states_BND), plan.reduce(tokens.states_BND)
    assert torch.equal(reduced[1:], expected[1:])
    for name in ("slot_BN", "weight_BN", "mask_BK"):
        assert torch.equal(getattr(found, name)[1:], getattr(plan, name)[1:])


@every
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1e30,
        lambda x: x * 1e-30,
        lambda x: x.sign() * 3e38,
        lambda x: x * 0,
        lambda x: x * 0 + 1,
        lambda x: x[:1, :1].expand(x.shape).clone(),
        lambda x: x if x.ndim == 2 else x[..., :1] * x[:1, :1],
        lambda x: x.round(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
    ],
    ids=["huge", "tiny", "largest", "zero", "one", "equal", "rank-one", "ties", "half", "bfloat"],
)
def test_counts_hold_whatever_the_values(reducer, change):
    tokens = changed(batch(1), change)
    plan = reducer.plan(tokens)
    holds(reducer, plan, tokens)
    assert plan.matrix().isfinite().all()


@every
def test_scale_changes_no_choice(reducer):
    """Squares of features of 1e25 are beyond float32."""
    tokens = batch(2)

    def change(x):
        return x if x.ndim == 2 else x * 2.0**83

    plan, scaled = reducer.plan(tokens), reducer.plan(changed(tokens, change))
    assert torch.equal(plan.slot_BN, scaled.slot_BN)


@every
def test_padding_may_hold_anything(reducer):
    tokens = batch(3)
    plan = reducer.plan(tokens)
    mask, image = tokens.mask_BN, tokens.mask_BN[:, tokens.text :]
    for value in (torch.nan, torch.inf, 1e30):

        def change(x, value=value):
            real = mask if x.shape[1] == mask.shape[1] else image
            return torch.where(real if x.ndim == 2 else real[..., None], x, value)

        found = reducer.plan(changed(tokens, change))
        assert torch.equal(found.slot_BN, plan.slot_BN)
        assert torch.equal(found.mask_BK, plan.mask_BK)
        reduced = found.reduce(changed(tokens, change).states_BND)
        expected = plan.reduce(tokens.states_BND)
        torch.testing.assert_close(reduced[plan.mask_BK], expected[plan.mask_BK])


@every
@pytest.mark.parametrize(
    ("grids", "words"), [(((1, 1),), (3,)), (((1, 1), (2, 3)), (1, 4)), (((2, 2),), (0,))]
)
@pytest.mark.parametrize("padding", [0, 2])
def test_small_images(reducer, grids, words, padding):
    tokens = batch(0, grids=grids, words=words, padding=padding)
    holds(reducer, reducer.plan(tokens), tokens)


@every
def test_no_image_token_at_all(reducer):
    """An axis of length 0, and a row that is nothing but padding."""
    tokens = batch(0, grids=((1, 3), (2, 2)), words=(2, 3))
    empty = replace(
        tokens,
        mask_BN=tokens.mask_BN[:, : tokens.text],
        sizes_BN=tokens.sizes_BN[:, : tokens.text],
        states_BND=tokens.states_BND[:, : tokens.text],
        patch_BN=tokens.patch_BN[:, : tokens.text],
        encoder=Encoder(**{name: x[:, :0] for name, x in vars(tokens.encoder).items()}),
    )
    plan = reducer.plan(empty)
    assert torch.equal(plan.mask_BK, empty.mask_BN)
    assert torch.equal(plan.reduce(empty.states_BND), empty.states_BND)

    mask = tokens.mask_BN.clone()
    mask[0, tokens.text :] = False
    padded = replace(tokens, mask_BN=mask)
    plan = reducer.plan(padded)
    holds(reducer, plan, padded)
    assert torch.equal(plan.slot_BN[1], reducer.plan(tokens).slot_BN[1])


def test_relevance_alone_decides_at_the_end_of_theta():
    """exp(5,000) is more than there is."""
    image, words = noise(1, 30, 8), noise(1, 5, 8)
    tokens = of_images(image, words_BTD=words)
    unit_image, unit_words = (unit_vectors(x, torch.float64) for x in (image, words))
    cosines = (unit_image @ unit_words.transpose(1, 2)).mean(2)[0]
    for inverted, best in ((False, cosines.argmax()), (True, cosines.argmin())):
        plan = CDPruner(keep=1, theta=0.9999, inverted=inverted).plan(tokens)
        assert kept(plan, text=5) == [int(best)]


def test_a_calibration_on_what_has_no_energy():
    probe = EnergyCalibrator()
    probe.plan(changed(batch(0), set_row(torch.nan)))
    ((energy_BR, count_B),) = probe.noted
    assert energy_BR.isfinite().all()
    assert count_B.tolist() == [rows * columns for rows, columns in GRIDS]


def test_equal_directions_are_all_counted():
    """Eight tokens at right angles: none of their directions is one of its own."""
    tokens = of_images(torch.eye(8)[None])
    assert kept(SVDPrune(keep=3, features="states", energy=0.5).plan(tokens)) == [0, 1, 2]


def test_chains_add_up_what_enters_several_slots():
    tokens = batch(0)
    first = PruMerge(keep=0.5).plan(tokens)
    left = replace(
        tokens,
        layer=1,
        mask_BN=first.mask_BK,
        sizes_BN=first.total(tokens.sizes_BN),
        states_BND=first.reduce(tokens.states_BND),
        queries_BHNC=noise(len(GRIDS), 2, first.slots, 4),
        keys_BHNC=noise(len(GRIDS), 2, first.slots, 4),
    )
    later = Chain((PruMerge(keep=0.5), PyramidDrop(keep=(0.5,), layers=(1,)))).plan(left)
    found = first.then(later).reduce(tokens.states_BND)
    torch.testing.assert_close(found, later.reduce(left.states_BND))
