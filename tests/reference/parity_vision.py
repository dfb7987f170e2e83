"""Ours against the published code of what chooses by the vision encoder.

Departures are asserted where they are, each with its reason: `test_parity_selectors` runs the rest
as equal. Shape suffixes as in `pumer.reducers.base`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from selector_parity import Case
from torch import Tensor

from pumer.reducers import (
    EMBEDDINGS,
    SCOPE,
    CDPruner,
    DivPrune,
    Encoder,
    FasterVLM,
    HiPrune,
    HoloV,
    MMTok,
    Plan,
    PruMerge,
    Reducer,
    Tokens,
    TokenShape,
    VisionZip,
    VisPruner,
)
from pumer.reducers.cdpruner import mean_direction
from pumer.reducers.mmtok import GAIN_DECIMALS
from pumer.reducers.ops.greedy import cosines, coverage, determinantal

RELATIVE = 1e-5


def of_images(
    states_BID: Tensor, encoder: Encoder | None = None, words_BTD: Tensor | None = None
) -> Tokens:
    """Image tokens of one or several crops, all real, with the words that belong to them."""
    text = 0 if words_BTD is None else words_BTD.shape[1]
    states_BND = states_BID if words_BTD is None else torch.cat([words_BTD, states_BID], 1)
    mask_BN = torch.ones(states_BND.shape[:2], dtype=torch.bool)
    return Tokens(
        mask_BN=mask_BN,
        text=text,
        sizes_BN=mask_BN.float(),
        layer=EMBEDDINGS,
        num_prefix_tokens=0,
        states_BND=states_BND,
        encoder=encoder,
    )


def kept(plan: Plan, row: int = 0, text: int = 0) -> list[int]:
    """The image tokens that stand in a slot of their own, ascending."""
    assert plan.index_BK is not None
    return (plan.index_BK[row, text:][plan.mask_BK[row, text:]] - text).tolist()


def equal_kept(reducer: Reducer, tokens: Tokens, expected: Tensor) -> None:
    plan = reducer.plan(tokens)
    assert kept(plan, text=tokens.text) == expected.tolist()


def stand_by_themselves(plan: Plan, keep_K: Tensor) -> None:
    """These tokens, ascending, are what the first slots stand for, with a share of 1."""
    slots = torch.arange(len(keep_K))
    assert plan.slot_BN[0, keep_K].tolist() == slots.tolist()
    assert (plan.matrix()[0, slots, keep_K] == 1).all()


def equal_features(found_KD: Tensor, expected_KD: Tensor) -> None:
    """Every row within `RELATIVE` of its norm."""
    error_K = (found_KD - expected_KD).norm(dim=1) / expected_KD.norm(dim=1).clamp_min(1e-12)
    assert float(error_K.max()) < RELATIVE


def valid(reducer: Reducer, tokens: Tokens, count: int) -> None:
    """Where the published code raises: ours keeps `count` different image tokens, as promised."""
    plan = reducer.plan(tokens)
    length = tokens.mask_BN.shape[1]
    assert reducer.lengths(TokenShape(0, length, EMBEDDINGS, num_prefix_tokens=0)) == (0, count)
    assert plan.mask_BK.all()
    assert len(set(kept(plan))) == count


def fastervlm(case: Case) -> None:
    attention_BN = case.inputs["class_attention"].mean(1)
    reducer = FasterVLM(keep=case.settings["keep"])
    tokens = of_images(attention_BN[..., None], Encoder(class_attention_BN=attention_BN))
    if case.raises:  # more are asked for than there are: ours keeps all
        return valid(reducer, tokens, attention_BN.shape[1])
    plan = reducer.plan(tokens)
    expected = [
        case.outputs.get(f"keep{row}", case.outputs.get("keep")) for row in range(len(attention_BN))
    ]
    assert [kept(plan, row) for row in range(len(attention_BN))] == [x.tolist() for x in expected]
    return None


def vispruner(case: Case) -> None:
    features_BND = case.inputs["features"]
    encoder = Encoder(
        features_BND=features_BND, class_attention_BN=case.inputs["class_attention"].mean(1)
    )
    reducer = VisPruner(**case.settings)
    if case.raises:  # an odd number of tokens for the diverse part: ours takes them
        return valid(reducer, of_images(features_BND, encoder), case.settings["keep"])
    return equal_kept(reducer, of_images(features_BND, encoder), case.outputs["keep"])


def holov(case: Case) -> None:
    encoder = Encoder(class_attention_BN=case.inputs["attention"][None])
    tokens = of_images(case.inputs["features"][None], encoder)
    equal_kept(HoloV(**case.settings), tokens, case.outputs["keep"])


def scope(case: Case) -> None:
    """Ours reads the mean over heads, theirs the sum: what is added counts as often as there are
    heads."""
    attention_HN = case.inputs["class_attention"]
    features_BND = case.inputs["features"][None]
    combine = {"multi": "multiply", "add": "add"}[case.settings["combined"]]
    alpha = case.settings["alpha"] * (len(attention_HN) if combine == "add" else 1)
    encoder = Encoder(features_BND=features_BND, class_attention_BN=attention_HN.mean(0)[None])
    reducer = SCOPE(keep=case.settings["keep"], alpha=alpha, combine=combine)
    # The states are noise: what is compared is the encoder's.
    equal_kept(reducer, of_images(torch.randn(features_BND.shape), encoder), case.outputs["keep"])


def divprune(case: Case) -> None:
    features_BND = case.inputs["features"][None]
    plan = DivPrune(keep=case.settings["ratio"]).plan(of_images(features_BND))
    if case.name == "duplicates":  # token 60 + j is token j: which of the two stays is a tie
        pairs = sorted(token % 60 for token in kept(plan))
        assert pairs == case.outputs["keep_modulo_pairs"].tolist()
    else:
        assert kept(plan) == case.outputs["keep"].tolist()


def cdpruner(case: Case) -> None:
    """With one space for both, the reducer; with CLIP's for relevance, its parts.

    The reducer reads the language model's embeddings, as the paper has it for models without a CLIP
    text tower: LLaVA has none.
    """
    reducer = CDPruner(keep=case.settings["keep"], inverted=True)
    features_BND, text_BTD = case.inputs["features"][None], case.inputs["text_embeds"][None]
    if case.name.startswith("joint_"):
        return equal_kept(
            reducer, of_images(features_BND, words_BTD=text_BTD), case.outputs["keep"]
        )
    valid_BI = torch.ones(features_BND.shape[:2], dtype=torch.bool)
    text_BD = mean_direction(text_BTD, torch.ones(text_BTD.shape[:2], dtype=torch.bool))
    weight_BI = reducer.weights(case.inputs["image_embeds"][None], text_BD, valid_BI)
    kernel_BII = cosines(features_BND) * weight_BI[:, :, None] * weight_BI[:, None]
    count = case.settings["keep"]
    chosen_BI = determinantal(kernel_BII, valid_BI, torch.tensor([count]), count)
    assert chosen_BI[0].nonzero()[:, 0].tolist() == case.outputs["keep"].tolist()
    return None


def mmtok(case: Case) -> None:
    """The reducer; where tokens are left out that count in what is covered, its parts.

    Padding never counts for ours, and a batch of the published code is one image.
    """
    settings = case.settings
    reducer = MMTok(
        keep=settings["keep"],
        alpha=settings["alpha"],
        text_temperature=settings["tv_temperature"],
        image_temperature=settings["vv_temperature"],
    )
    encoder = Encoder(features_BND=case.inputs["vision_encoder"][None])
    words_BTD = case.inputs["text"][None]
    tokens = of_images(case.inputs["vision"][None], encoder, words_BTD)
    if "padding" not in case.inputs:
        return equal_kept(reducer, tokens, case.outputs["keep"])
    cover_BIR = reducer.cover(tokens)
    choosable_BI = torch.ones(cover_BIR.shape[:2], dtype=torch.bool)
    choosable_BI[:, case.inputs["padding"]] = False
    weight_BI, count = torch.ones(choosable_BI.shape), settings["keep"]
    chosen_BI = coverage(
        cover_BIR,
        weight_BI,
        0 * weight_BI,
        choosable_BI,
        torch.tensor([count]),
        count,
        decimals=GAIN_DECIMALS,
    )
    assert chosen_BI[0].nonzero()[:, 0].tolist() == case.outputs["keep"].tolist()
    return None


def in_grid(case: Case, shallow_BN: Tensor, deep_BN: Tensor) -> Tokens:
    """All patches of the grid of a case, with what they receive in two layers."""
    encoder = Encoder(middle_received_BN=shallow_BN, received_BN=deep_BN)
    patch_BN = torch.arange(deep_BN.shape[1]).expand(deep_BN.shape)
    grid = case.settings["height"], case.settings["width"]
    return replace(of_images(deep_BN[..., None], encoder), grid=grid, patch_BN=patch_BN)


def hiprune(case: Case) -> None:
    """Every crop has a budget of its own."""
    shallow_BN, deep_BN = case.inputs["shallow"], case.inputs["deep"]
    crops, count = deep_BN.shape
    keep = case.settings["retention"] // crops
    reducer = HiPrune(keep=keep, alpha=case.settings["alpha"], object_layer=9)
    tokens = in_grid(case, shallow_BN, deep_BN)
    if case.raises:  # more are asked for than there are: ours keeps all
        return valid(reducer, tokens, count)
    plan = reducer.plan(tokens)
    expected = [case.outputs.get(f"keep{row}", case.outputs.get("keep")) for row in range(crops)]
    assert [kept(plan, row) for row in range(crops)] == [x.tolist() for x in expected]
    return None


def hiprune_qwen(case: Case) -> None:
    """The published code takes 1 off sums over queries, whose mean is 4 in these cases: ours takes
    off a number of means."""
    shallow_BN, deep_BN = case.inputs["shallow"][None], case.inputs["deep"][None]
    reducer = HiPrune(
        keep=case.settings["retention"],
        alpha=case.settings["alpha"],
        object_layer=16,
        penalty=1 / float(deep_BN.mean()),
    )
    queries = float(deep_BN.sum())
    tokens = in_grid(case, shallow_BN / queries, deep_BN / queries)
    equal_kept(reducer, tokens, case.outputs["keep"])


def visionzip(case: Case) -> None:
    """The published rows have the dominant tokens first: ours leave every token at its place."""
    features_BND = case.inputs["features"][None, 1:]
    encoder = Encoder(
        class_attention_BN=case.inputs["class_attention"].mean(0)[None, 1:],
        keys_BNC=case.inputs["keys"][None, 1:],
    )
    dominant, contextual = case.settings["dominant"], case.settings["contextual"]
    plan = VisionZip(keep=dominant + contextual, contextual=contextual).plan(
        of_images(features_BND, encoder)
    )
    stand_by_themselves(plan, case.outputs["keep"])
    order_K = case.outputs["order_positions"].argsort()
    equal_features(plan.reduce(features_BND)[0], case.outputs["features"][order_K])


def prumerge(case: Case) -> None:
    """The published rows stand by attention: ours by place; the extra token is last in both.

    Where all tokens are kept the published extra token is zero, and ours is not there.
    """
    keys_BNC, query_BC = case.inputs["keys"][None], case.inputs["queries"][None, 0]
    logits_BN = (query_BC[:, None] @ keys_BNC.transpose(1, 2))[:, 0] * keys_BNC.shape[2] ** -0.5
    encoder = Encoder(
        last_class_attention_BN=logits_BN.softmax(-1)[:, 1:], last_keys_BNC=keys_BNC[:, 1:]
    )
    features_BND = case.inputs["features"][None, 1:]
    plan = PruMerge(plus=case.method == "prumerge_plus").plan(of_images(features_BND, encoder))

    expected_KD, order_K = case.outputs["features"], case.outputs["order_positions"].argsort()
    if len(order_K) == features_BND.shape[1]:
        assert not expected_KD[-1].any()
        expected_KD = expected_KD[:-1][order_K]
    else:
        expected_KD = torch.cat([expected_KD[:-1][order_K], expected_KD[-1:]])
    found_KD = plan.reduce(features_BND)[0, plan.mask_BK[0]]
    stand_by_themselves(plan, case.outputs["keep"])
    assert found_KD.shape == expected_KD.shape
    equal_features(found_KD, expected_KD)


RUNNERS = {
    "cdpruner": cdpruner,
    "divprune": divprune,
    "fastervlm": fastervlm,
    "hiprune": hiprune,
    "hiprune_qwen": hiprune_qwen,
    "holov": holov,
    "mmtok": mmtok,
    "prumerge": prumerge,
    "prumerge_plus": prumerge,
    "scope": scope,
    "visionzip": visionzip,
    "vispruner": vispruner,
}
