"""The published PuMer code (csarron/PuMer), bug for bug, for checkpoints trained with it.

It differs from the paper, and from `PuMer` without `official=True`: the image [CLS] is an ordinary
token; kept tokens are ordered by score, which changes the matching; padded text scores, counts and
merges; masks become fractional; the image mask is ignored; groups are averaged without their sizes;
nothing is merged where nothing is pruned.

Shape suffixes: B batch, H heads, N tokens, T text tokens, I image tokens, K slots, A even and C odd
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumer.reducers.ops.matching import rank
from pumer.reducers.ops.saliency import text_saliency
from pumer.reducers.plan import Plan
from pumer.reducers.tokens import Tokens

STYLES = ("tome", "tip", "diff")
EPSILON = 1e-6


def masked_softmax(logits_BHQN: Tensor, mask_BN: Tensor) -> Tensor:
    """Softmax with a 0/1 or fractional mask over the keys; a query always sees the key of its own
    index.

    Masked keys keep a weight of about 1e-6 / N. Computed in float32, returned in the dtype of the
    logits.
    """
    logits = logits_BHQN.float()
    queries, count = logits.shape[-2:]
    identity = torch.eye(queries, count, device=logits.device)
    mask = mask_BN.float()[:, None, None]
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * (mask + (1 - mask) * identity)
    probabilities = (weights + EPSILON / count) / (weights.sum(-1, keepdim=True) + EPSILON)
    return probabilities.to(logits_BHQN.dtype)


def cosine(keys_BND: Tensor) -> Tensor:
    """Similarity of every token at an even position with every one at an odd position, [B,A,C].

    Rounded to a millionth: METER's padded tokens are all equal, and their positions should decide
    which of them merge, not the last bit, which differs between processors.
    """
    unit = torch.nn.functional.normalize(keys_BND, dim=-1)
    return (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).round(decimals=6)


def closeness(score_BN: Tensor) -> Tensor:
    """The same from scores: their negated difference, [B,A,C]."""
    return -(score_BN[:, ::2, None] - score_BN[:, None, 1::2]).abs()


def match(
    similarity_BAC: Tensor, merged: int, protect_first: bool = True, average: bool = True
) -> Plan:
    """Bipartite soft matching in the published layout: [unmerged even positions | all odd
    positions].

    Args:
        similarity_BAC: of the tokens at even positions with those at odd ones.
        merged: tokens to merge away, clipped to half of the unprotected ones.
        protect_first: never merge token 0 away; unmerged tokens are then ordered by position, else
            by falling similarity.
        average: each group's mean; else its sum.

    Raises:
        ValueError: if nothing can be merged (the published code raises a TypeError).
    """
    evens, odds = similarity_BAC.shape[1:]
    merged = min(merged, (evens + odds - protect_first) // 2)
    if merged <= 0:
        raise ValueError(
            f"{evens + odds} tokens are too few to merge any: lower the ratios or the number of "
            "layers"
        )
    # The best partner of every even position; the most similar `merged` of them are merged away.
    best_BA, partner_BA = similarity_BAC.max(-1)
    if protect_first:
        first = torch.arange(evens, device=best_BA.device) == 0
        best_BA = best_BA.masked_fill(first, -torch.inf)
    place_BA = rank(best_BA)
    stays_BA = place_BA >= merged
    even_slot_BA = stays_BA.long().cumsum(1) - 1 if protect_first else place_BA - merged
    # Slots: unmerged even positions first, then all odd positions.
    slot_BN = torch.empty(len(best_BA), evens + odds, dtype=torch.int64, device=best_BA.device)
    slot_BN[:, 1::2] = evens - merged + torch.arange(odds, device=best_BA.device)
    slot_BN[:, ::2] = torch.where(stays_BA, even_slot_BA, evens - merged + partner_BA)
    ones = torch.ones(slot_BN.shape, device=slot_BN.device)
    plan = Plan.merge(slot_BN, ones[:, merged:], ones)
    return plan if average else Plan(slot_BN, ones, plan.mask_BK)


def counts(image: int, prune: float, merge: float) -> tuple[int, int]:
    """(kept, merged) image tokens; both ratios are of the unpruned number, [CLS] included."""
    return max(image - round(prune * image), 1), round(merge * image)


def lengths(
    text: int, image: int, prune: float, merge: float, merge_text: float, style: str
) -> tuple[int, int]:
    """Text and image length after a reduction."""
    if round(prune * image) == 0:
        if (
            prune == 0 and merge >= 1
        ):  # matched together: the published code does not update the text length
            return text, image - min(int(merge), (text + image - 1) // 2)
        return text, image
    kept, merged = counts(image, prune, merge)
    protected = 0 if style == "diff" else 1
    merged_text = min(round(text * merge_text), (text - 1) // 2)
    return text - merged_text, kept - min(merged, (kept - protected) // 2)


def lengths_meter(
    text: int, image: int, prune: float, merge: float, merge_text: float
) -> tuple[int, int]:
    """Text and image length after a reduction in METER's fusion layer."""
    if prune == 0:
        return text, image
    kept, merged = counts(image, prune, merge)
    image_left = image if merged == 0 else kept - min(merged, (kept - 1) // 2)
    return text - min(round(text * merge_text), (text - 1) // 2), image_left


def plan_meter(tokens: Tokens, prune: float, merge: float, merge_text: float) -> Plan:
    """The published token reducer of METER's fusion layer: it prunes only where it merges, and vice
    versa."""
    text, image = tokens.text, tokens.mask_BN.shape[1] - tokens.text
    mask_BN, keys_BNC = tokens.mask_BN.float(), tokens.mean_keys_BNC
    if prune == 0:
        return Plan.identity(mask_BN)
    kept, merged = counts(image, prune, merge)
    image_plan = Plan.identity(torch.ones_like(mask_BN[:, text:]))
    if merged > 0:
        image_plan, _ = _most_attended(tokens, "mean_head", kept)
        image_plan = image_plan.then(match(cosine(image_plan.reduce(keys_BNC[:, text:])), merged))
    return Plan.side_by_side(
        [_merged_text(mask_BN[:, :text], keys_BNC[:, :text], merge_text), image_plan]
    )


def plan(
    tokens: Tokens, prune: float, merge: float, merge_text: float, score: str, style: str
) -> Plan:
    """The published token reducer of ViLT's block."""
    text, image = tokens.text, tokens.mask_BN.shape[1] - tokens.text
    mask_BN = tokens.mask_BN.float()
    keys_BNC = tokens.mean_keys_BNC
    if round(prune * image) == 0:
        if prune == 0 and merge >= 1:
            joint = match(cosine(keys_BNC), int(merge))
            return Plan(joint.slot_BN, joint.weight_BN, joint.reduce(mask_BN))
        return Plan.identity(mask_BN)

    # Prune by the text's attention, then merge the image, then the text.
    kept, merged = counts(image, prune, merge)
    image_plan, score_BK = _most_attended(tokens, score, kept)
    if merged > 0:
        if style == "diff":
            image_plan = image_plan.then(
                match(closeness(score_BK), merged, protect_first=False, average=False)
            )
        else:
            similarity = cosine(image_plan.reduce(keys_BNC[:, text:]))
            image_plan = image_plan.then(match(similarity, merged, average=style == "tome"))
    return Plan.side_by_side(
        [_merged_text(mask_BN[:, :text], keys_BNC[:, :text], merge_text), image_plan]
    )


def _most_attended(tokens: Tokens, score: str, kept: int) -> tuple[Plan, Tensor]:
    """The image tokens with the highest scores, in that order, and their scores [B,K]."""
    text, image = tokens.text, tokens.mask_BN.shape[1] - tokens.text
    rows_BT = torch.ones(
        tokens.mask_BN.shape[0], text, device=tokens.mask_BN.device
    )  # padded rows vote too
    score_BI = text_saliency(tokens, score, rows_BT) / tokens.mask_BN[:, :text].sum(1, keepdim=True)
    score_BK, order_BK = score_BI.topk(kept)
    return Plan.select(order_BK, torch.ones_like(score_BK), image), score_BK


def _merged_text(mask_BT: Tensor, keys_BTC: Tensor, merge_text: float) -> Plan:
    """Text merging; the mask is averaged along."""
    merged = round(mask_BT.shape[1] * merge_text)
    if merged == 0:
        return Plan.identity(mask_BT)
    merging = match(cosine(keys_BTC), merged)
    return Plan(merging.slot_BN, merging.weight_BN, merging.reduce(mask_BT))
