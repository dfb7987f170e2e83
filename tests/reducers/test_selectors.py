"""Methods that keep a number of image tokens: each against a slow loop, and what holds for all of
them."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import slow_selectors as slow
import torch
from pictures import FULL, GRIDS, alone, batch, kept, mixture, picture, shares
from torch._dynamo.testing import CompileCounterWithBackend

from pumer.reducers import (
    DART,
    EMBEDDINGS,
    SCOPE,
    VTW,
    CDPruner,
    Chain,
    Compose,
    DivPrune,
    DyMU,
    Encoder,
    Energy,
    FasterVLM,
    FoPru,
    HiPrune,
    HoloV,
    MMTok,
    ModelShape,
    PruMerge,
    PyramidDrop,
    Selector,
    SparseVLM,
    SVDPrune,
    TokenShape,
    Unreduced,
    V2Drop,
    VisionZip,
    VisPruner,
    from_dict,
    to_dict,
)
from pumer.reducers.ops.budget import num_keep as budget
from pumer.reducers.ops.clustering import density_peaks

SEEDS = range(4)
SELECTORS = {
    "fopru": (FoPru(), slow.fopru),
    "fopru-variance": (FoPru(saliency="variance"), slow.fopru_variance),
    "fopru-row": (FoPru(strategy="row"), slow.fopru_row),
    "svd-prune": (SVDPrune(), slow.svd_prune),
    "svd-prune-more": (SVDPrune(energy=0.6), partial(slow.svd_prune, energy=0.6)),
    "svd-prune-mass": (SVDPrune(mass=0.4), partial(slow.svd_prune_mass, mass=0.4)),
    "divprune": (DivPrune(), slow.divprune),
    "cdpruner": (CDPruner(), slow.cdpruner),
    "cdpruner-inverted": (
        CDPruner(inverted=True, theta=0.6),
        partial(slow.cdpruner, inverted=True, theta=0.6),
    ),
    "scope": (SCOPE(), slow.scope),
    "scope-coverage": (SCOPE(alpha=0.0), partial(slow.scope, alpha=0.0)),
    "scope-added": (
        SCOPE(alpha=40.0, combine="add"),
        partial(slow.scope, alpha=40.0, combine="add"),
    ),
    "fastervlm": (FasterVLM(), slow.fastervlm),
    "vispruner": (VisPruner(), slow.vispruner),
    "vispruner-diverse": (VisPruner(important=0.2), partial(slow.vispruner, important=0.2)),
    "holov": (HoloV(chunks=4), partial(slow.holov, chunks=4)),
    "holov-16": (HoloV(), partial(slow.holov, chunks=16)),
    "holov-auto": (HoloV(chunks="auto"), partial(slow.holov, chunks="auto")),
    "dart": (DART(), partial(slow.dart, pivots=(4, 4))),
    "dart-few": (DART(pivots=(1, 2)), partial(slow.dart, pivots=(1, 2))),
    "pyramiddrop": (PyramidDrop(keep=(0.5,), layers=(2,)), slow.pyramiddrop),
    "mmtok": (MMTok(), slow.mmtok),
    "mmtok-image": (
        MMTok(alpha=30.0, image_temperature=0.05),
        partial(slow.mmtok, alpha=30.0, of_image=0.05),
    ),
    "mmtok-words": (
        MMTok(alpha=0.0, text_temperature=0.1),
        partial(slow.mmtok, alpha=0.0, of_text=0.1),
    ),
    "hiprune": (HiPrune(object_layer=1), slow.hiprune),
    "hiprune-anchors": (
        HiPrune(object_layer=1, alpha=0.9),
        partial(slow.hiprune, alpha=0.9),
    ),
    "v2drop": (V2Drop(keep=(0.5,), layers=(2,)), slow.v2drop),
}
MERGERS = {
    "visionzip": (VisionZip(), partial(slow.visionzip, contextual=0.15625)),
    "visionzip-half": (VisionZip(contextual=0.5), partial(slow.visionzip, contextual=0.5)),
    "visionzip-none": (VisionZip(contextual=0.0), partial(slow.visionzip, contextual=0.0)),
    "visionzip-three": (VisionZip(contextual=3), partial(slow.visionzip, contextual=3)),
    "sparsevlm": (SparseVLM(keep=(0.5,), layers=(2,)), slow.sparsevlm),
    "sparsevlm-sum": (
        SparseVLM(keep=(0.5,), layers=(2,), merge="sum"),
        partial(slow.sparsevlm, merge="sum"),
    ),
    "sparsevlm-rating": (
        SparseVLM(keep=(0.5,), layers=(2,), merge="rating"),
        partial(slow.sparsevlm, merge="rating"),
    ),
}
FIXED = {"prumerge": PruMerge(keep=0.5), "prumerge-outliers": PruMerge(keep=0.5, plus=False)}
ADAPTIVE = {
    "prumerge": PruMerge(plus=False),
    "prumerge-plus": PruMerge(),
    "svd-prune-mass": SVDPrune(mass=0.5),
    "energy": Energy(tau=0.8),
    "energy-visionzip": Energy(VisionZip(), tau=0.9, least=3, most=0.6),
    "energy-dart": Energy(DART(layer=2), tau=0.7),
    "dymu": DyMU(thresholds=(0.2, 0.4, 0.3)),
    "fopru-whole-rows": FoPru(strategy="row", fill=False),
}
EVERY = (
    {name: reducer for name, (reducer, _) in (SELECTORS | MERGERS).items()}
    | FIXED
    | {f"{name}-adaptive": reducer for name, reducer in ADAPTIVE.items()}
)
every = pytest.mark.parametrize("reducer", EVERY.values(), ids=EVERY)


def keeping(reducer, keep):
    """The same reducer with another budget."""
    return replace(reducer, keep=(keep,) if isinstance(reducer.keep, tuple) else keep)


def same(found, expected):
    """The same groups of tokens in the same order, with the same shares."""
    assert [sorted(group) for group in found] == [sorted(group) for group in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


# --- each is what its paper says ---


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.8, 5])
@pytest.mark.parametrize(("reducer", "reference"), SELECTORS.values(), ids=SELECTORS)
def test_a_selection_is_what_the_paper_says(reducer, reference, keep):
    reducer = keeping(reducer, keep)
    for seed in SEEDS:
        tokens = batch(seed, layer=reducer.layers[0])
        plan = reducer.plan(tokens)
        for row in range(len(GRIDS)):
            one = picture(tokens, row)
            count = reducer.budget(one.count, reducer.layers[0])
            assert kept(plan, tokens, row) == reference(one, count)


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.8, 5])
@pytest.mark.parametrize(("reducer", "reference"), MERGERS.values(), ids=MERGERS)
def test_a_merging_is_what_the_paper_says(reducer, reference, keep):
    reducer = keeping(reducer, keep)
    for seed in SEEDS:
        tokens = batch(seed, layer=reducer.layers[0])
        plan = reducer.plan(tokens)
        for row in range(len(GRIDS)):
            one = picture(tokens, row)
            same(shares(plan, tokens, row), reference(one, budget(keep, one.count)))


def test_more_tokens_than_channels_have_the_same_leverage():
    tokens = batch(0, grids=((8, 8),), words=(2,), padding=0, width=24)
    plan = SVDPrune(keep=0.3).plan(tokens)
    assert kept(plan, tokens, 0) == slow.svd_prune(picture(tokens, 0, ((8, 8),)), 19)


def test_features_can_be_centred_and_scaled():
    tokens = batch(1)
    plan = SVDPrune(keep=0.3, center=True, normalize=True).plan(tokens)
    for row in range(len(GRIDS)):
        one = picture(tokens, row)
        features = one.features - one.features.mean(0)
        scores = slow.leverage(slow.unit(features), 0.9)
        assert kept(plan, tokens, row) == slow.top(scores, budget(0.3, one.count))


def test_whole_rows_of_the_picture():
    reducer = FoPru(keep=0.4, strategy="row", fill=False)
    tokens = batch(2)
    plan = reducer.plan(tokens)
    for row in range(len(GRIDS)):
        assert kept(plan, tokens, row) == slow.fopru_whole_rows(picture(tokens, row), 0.4)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_prumerge_keeps_the_outliers(seed, plus):
    tokens = batch(seed)
    plan = PruMerge(plus=plus).plan(tokens)
    for row in range(len(GRIDS)):
        expected = slow.prumerge(picture(tokens, row), plus)
        np.testing.assert_allclose(mixture(plan, tokens, row), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1, 2, 1.0])
def test_prumerge_with_a_budget(keep):
    for seed in SEEDS:
        tokens = batch(seed)
        plan = PruMerge(keep=keep).plan(tokens)
        for row in range(len(GRIDS)):
            image = picture(tokens, row)
            expected = slow.prumerge_fixed(image, budget(keep, image.count))
            assert len(expected) == budget(keep, image.count)
            np.testing.assert_allclose(mixture(plan, tokens, row), expected, rtol=1e-6, atol=0)


def test_prumerge_adds_no_more_than_32_neighbours():
    tokens = batch(0, grids=((8, 8),), words=(2,), padding=3)
    plan = PruMerge().plan(tokens)
    found = mixture(plan, tokens, 0)
    np.testing.assert_allclose(found, slow.prumerge(picture(tokens, 0, ((8, 8),)), plus=True))
    assert ((found != 0).sum(1)[:-1] == 33).all()


@pytest.mark.parametrize("neighbours", [0, 3, 100])
def test_prumerge_adds_as_many_neighbours_as_asked_for(neighbours):
    tokens = batch(1)
    plan = PruMerge(neighbours=neighbours).plan(tokens)
    for row in range(len(GRIDS)):
        expected = slow.prumerge(picture(tokens, row), plus=True, neighbours=neighbours)
        np.testing.assert_allclose(mixture(plan, tokens, row), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cap", [1, 4, 0.2, 1.0])
def test_dymu_merges_no_more_than_its_cap(cap):
    tokens = batch(2, layer=1)
    plan = DyMU(thresholds=(0.9, -1.0), cap=cap).plan(tokens)
    merged = set()
    for row in range(len(GRIDS)):
        image = picture(tokens, row)
        most = cap if isinstance(cap, int) else round(cap * image.count)
        expected = slow.dymu(image, -1.0, min(most, image.count // 2))
        same(shares(plan, tokens, row), expected)
        merged.add(image.count - len(expected))
    assert max(merged) > min(merged) or cap == 1


@pytest.mark.parametrize("reducer", [PruMerge(), DyMU(thresholds=(0.5,))], ids=["prumerge", "dymu"])
def test_settings_that_were_added_are_written_where_they_matter(reducer):
    """Digests of saved settings name the points of a study."""
    (name,) = reducer.added
    assert name not in to_dict(reducer)
    changed = replace(reducer, **{name: 5})
    assert to_dict(changed) == to_dict(reducer) | {name: 5}
    assert from_dict(to_dict(changed)) == changed


@pytest.mark.parametrize("seed", SEEDS)
def test_dymu_merges_what_is_alike_enough(seed):
    tokens = batch(seed, layer=1)
    plan = DyMU(thresholds=(0.9, 0.3)).plan(tokens)
    for row in range(len(GRIDS)):
        same(shares(plan, tokens, row), slow.dymu(picture(tokens, row), 0.3))


@pytest.mark.parametrize("clusters", [1, 4, 9])
def test_clusters_form_around_dense_tokens_far_from_denser_ones(clusters):
    generator = torch.Generator().manual_seed(clusters)
    x = torch.randn(2, 34, 6, generator=generator) * 3
    counts = (31, 20)
    valid = torch.arange(34) < torch.tensor(counts)[:, None]
    centre, nearest = density_peaks(x, valid, torch.tensor([clusters, clusters]))
    for row, count in enumerate(counts):
        expected = slow.density_peaks(x[row, :count].double().numpy(), clusters)
        assert nearest[row, :count].tolist() == expected
        assert set(centre[row].nonzero()[:, 0].tolist()) == set(expected)


def test_duplicates_are_kept_once():
    tokens = batch(0, **FULL)
    states, thrice = tokens.states_BND.clone(), [place // 3 for place in range(36)]
    states[:, tokens.text :] = states[:, tokens.text :][:, thrice]
    encoder = replace(tokens.encoder, features_BND=tokens.encoder.features_BND[:, thrice])
    tokens = replace(tokens, states_BND=states, encoder=encoder)
    for reducer in (DivPrune(keep=12), CDPruner(keep=12, theta=0.5), SCOPE(keep=12, alpha=0.0)):
        plan = reducer.plan(tokens)
        assert sorted(token // 3 for token in kept(plan, tokens, 0)) == list(range(12))
        # Budgets beyond what can be told apart are met nonetheless.
        more = keeping(reducer, 20).plan(tokens)
        assert len(set(kept(more, tokens, 0))) == 20


# --- what holds for all ---


@every
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_planned_alone_and_padding_stays_out(reducer, seed):
    layer = reducer.layers[-1]
    tokens = batch(seed, layer=layer)
    plan = reducer.plan(tokens)
    image = tokens.mask_BN.shape[1] - tokens.text
    text, slots = reducer.lengths(
        TokenShape(tokens.text, image, layer, num_prefix_tokens=0, grid=tokens.grid)
    )
    assert (text, text + slots) == (tokens.text, plan.slots)
    real = plan.sources() & tokens.mask_BN[:, None]
    assert torch.equal(real.any(2), plan.mask_BK)
    padded = plan.sources() & ~tokens.mask_BN[:, None]
    assert not (padded & plan.mask_BK[..., None]).any()
    for row in range(len(GRIDS)):
        one = alone(tokens, row)
        plan_alone = reducer.plan(one)
        same(shares(plan, tokens, row), shares(plan_alone, one, 0))
        found, expected = mixture(plan, tokens, row), mixture(plan_alone, one, 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@every
def test_shapes_are_known_without_looking_at_the_tokens(reducer):
    """On the meta device nothing can be read: whoever waits for a value fails."""
    tokens = batch(0, layer=reducer.layers[-1])

    def meta(x):
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    encoder = Encoder(**{name: meta(value) for name, value in vars(tokens.encoder).items()})
    blind = replace(
        tokens, **{name: meta(value) for name, value in vars(tokens).items()} | {"encoder": encoder}
    )
    plan = reducer.plan(blind)
    assert plan.slots == reducer.plan(tokens).slots
    assert plan.reduce(blind.states_BND).shape == (
        len(GRIDS),
        plan.slots,
        tokens.states_BND.shape[2],
    )


@pytest.mark.parametrize(
    "name", ["divprune", "vispruner", "sparsevlm", "energy-visionzip-adaptive"]
)
def test_one_graph_for_every_batch(name):
    reducer = EVERY[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    plan = torch.compile(reducer.plan, fullgraph=True, backend=counter)
    for seed in (0, 1):
        tokens = batch(seed, layer=reducer.layers[0])
        assert torch.equal(plan(tokens).slot_BN, reducer.plan(tokens).slot_BN)
    assert counter.frame_count == 1


@every
def test_noise_that_is_not_a_number_keeps_budgets(reducer):
    if reducer.traits.dynamic_length or not isinstance(reducer, Selector):
        pytest.skip("the data decide the number")
    tokens = batch(0, layer=reducer.layers[-1])
    states = torch.zeros_like(tokens.states_BND)
    encoder = Encoder(
        **{name: torch.zeros_like(value) for name, value in vars(tokens.encoder).items()}
    )
    for value in (0.0, torch.nan):
        blank = replace(tokens, states_BND=states + value, encoder=encoder)
        plan = reducer.plan(blank)
        expected = reducer.plan(tokens)
        assert torch.equal(plan.mask_BK, expected.mask_BK)
        assert torch.equal(plan.sources().any(2), expected.sources().any(2))


@pytest.mark.parametrize(
    "reducer", [reducer for reducer, _ in SELECTORS.values() if not reducer.traits.dynamic_length]
)
@pytest.mark.parametrize("keep", [1.0, 30, 10_000])
def test_a_budget_of_all_changes_nothing(reducer, keep):
    tokens = batch(0, layer=reducer.layers[0])
    plan = keeping(reducer, keep).plan(tokens)
    reduced = plan.reduce(tokens.states_BND)
    for row in range(len(GRIDS)):
        real = tokens.mask_BN[row]
        assert torch.equal(reduced[row, plan.mask_BK[row]], tokens.states_BND[row, real])


@pytest.mark.parametrize(
    "name", [*MERGERS, *FIXED, *(f"{name}-adaptive" for name in ("prumerge-plus", "dymu"))]
)
def test_sizes_are_kept_in_merging(name):
    reducer = EVERY[name]
    tokens = batch(3, layer=reducer.layers[0])
    plan = reducer.plan(tokens)
    sizes = tokens.sizes_BN * tokens.mask_BN
    dropped = (sizes * (plan.slot_BN < 0)).sum(1)
    torch.testing.assert_close(plan.total(sizes).sum(1) + dropped, sizes.sum(1))
    if name.startswith(("prumerge", "dymu")):
        assert not dropped.any()


@every
def test_settings_survive_json(reducer):
    assert from_dict(json.loads(json.dumps(to_dict(reducer)))) == reducer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DivPrune(keep=0), "keep is a share such as"),
        (lambda: DivPrune(keep=1.5), "keep is a share such as"),
        (lambda: FoPru(strategy="column"), "strategy is one of rank, row"),
        (lambda: FoPru(strategy="row", fill=False, keep=20), "whole rows are a share"),
        (lambda: FasterVLM(saliency="cls"), "saliency is one of class, received"),
        (lambda: SVDPrune(energy=1.0), "energy is a share"),
        (lambda: CDPruner(theta=1), "theta lies between"),
        (lambda: HoloV(chunks=0), "at least one chunk"),
        (lambda: DART(pivots=(0, 0)), "pivots are the numbers"),
        (lambda: PruMerge(neighbours=-1), "neighbours is a number of tokens from 0"),
        (lambda: DyMU(cap=0), "cap is a share such as"),
        (lambda: PyramidDrop(keep=(0.5, 0.7), layers=(1, 2)), "never rising"),
        (lambda: PyramidDrop(keep=(0.5,), layers=(1, 2)), "one number to keep for each layer"),
        (lambda: SparseVLM(keep=(5,), layers=(-1,)), "cannot act before layer 0"),
        (lambda: VisionZip(contextual=1.5), "contextual is a share"),
        (lambda: VisionZip(contextual=-1), "contextual is a share"),
        (lambda: FoPru(saliency="cls"), "saliency is one of class, received, variance"),
        (lambda: SCOPE(combine="sum"), "combine is one of multiply, add"),
        (lambda: SCOPE(saliency="variance"), "saliency is one of class, received"),
        (lambda: HoloV(chunks="many"), "chunks is"),
        (lambda: MMTok(alpha=-1.0), "alpha is a weight from 0"),
        (lambda: MMTok(text_temperature=0.0), "text_temperature is larger than 0"),
        (lambda: HiPrune(alpha=1.5), "alpha is a share from 0 to 1"),
        (lambda: HiPrune(object_layer=0), "object_layer is counted from 1"),
        (lambda: HiPrune(penalty=-1.0), "penalty is a number from 0, or None"),
        (lambda: V2Drop(keep=0.5), "keep is one number for each layer"),
        (lambda: V2Drop(keep=(1.5,)), r"keep\[0\] is a share from 0.0 to 1.0"),
        (lambda: V2Drop(keep=(0.5,), layers=(1, 2)), "one number to keep for each layer"),
        (lambda: V2Drop(keep=(0.5,), layers=(-1,)), "cannot act before layer 0"),
        (lambda: VTW(layer=0), "use no-vision"),
        (lambda: Compose(V2Drop(), Unreduced()), "acts in a language model, not in a vision tower"),
        (lambda: Compose(VTW(), Unreduced()), "acts in a language model, not in a vision tower"),
        (lambda: Energy(SparseVLM()), "can keep any number"),
        (lambda: Energy(PyramidDrop()), "acts in several layers"),
        (lambda: Energy(tau=1), "tau is a share"),
        (lambda: Chain((DivPrune(), FasterVLM())), "more than one reducer acts in layers"),
        (lambda: Chain(()), "give a tuple of reducers"),
    ],
)
def test_settings_that_make_no_sense_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_missing_is_named():
    tokens = batch(0)
    with pytest.raises(ValueError, match="needs the vision encoder's class_attention_BN"):
        FasterVLM().plan(replace(tokens, encoder=Encoder()))
    with pytest.raises(ValueError, match="take strategy="):
        FoPru(strategy="row").plan(replace(tokens, grid=None))
    with pytest.raises(ValueError, match="in a grid: choose another reducer"):
        HiPrune(object_layer=1).plan(replace(tokens, grid=None))
    with pytest.raises(ValueError, match="compares the input and the output of a layer"):
        V2Drop(keep=(0.5,), layers=(1,)).plan(replace(tokens, layer=1))
    with pytest.raises(ValueError, match="there is no attention before the first layer"):
        PyramidDrop(keep=(0.5,), layers=(1,)).plan(replace(tokens, layer=1))


def test_a_picture_smaller_than_the_budget_stays_whole():
    tokens = batch(0)
    plan = DivPrune(keep=20).plan(tokens)
    assert plan.mask_BK[:, tokens.text :].sum(1).tolist() == [20, 16, 14, 3]


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (PyramidDrop(), [576, 288, 144, 72]),
        (PyramidDrop(keep=(300, 100, 30)), [576, 300, 100, 30]),
        # 300 and clusters of 276 // 10 * 3 + 1 recycled ones, and so on.
        (SparseVLM(), [576, 309, 204, 113]),
        (SparseVLM(recycle=False), [576, 300, 200, 110]),
        (V2Drop(), [576, 288, 144, 1]),
        (V2Drop(keep=(0.25, 0.05, 0.0)), [576, 144, 7, 1]),
        (VTW(), [576, 0]),
    ],
)
def test_schedules(reducer, expected):
    lengths = [576]
    reducer = reducer.resolve(ModelShape(depth=32, last=30, image=576))
    for layer in reducer.layers:
        text, image = reducer.lengths(TokenShape(60, lengths[-1], layer, num_prefix_tokens=0))
        assert text == 60
        lengths.append(image)
    assert lengths == expected


def test_a_prompt_without_text():
    """Methods guided by text choose by what is left of them."""
    tokens = batch(0, grids=((4, 4),), words=(0,), padding=0)
    for reducer in (CDPruner(keep=6), MMTok(keep=6), DART(keep=6, layer=EMBEDDINGS)):
        assert len(kept(reducer.plan(tokens), tokens, 0)) == 6
