"""CDPruner: tokens that are unlike each other, and of these the ones that the text is about.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS
2025, arXiv 2506.10967.

Shape suffixes: B batch, I image tokens, T text tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.reducers.base import Tokens
from pumer.reducers.greedy import cosines, determinantal
from pumer.reducers.registry import register
from pumer.reducers.selector import Selector, candidates, image_states


@register
@dataclass(frozen=True)
class CDPruner(Selector):
    """Greedy choice from a determinantal point process: similarity of image tokens, weighted by relevance to the text.

    Relevance is the mean cosine with the prompt's embeddings, as the paper has it for models without a CLIP text tower;
    the images of a prompt without text are chosen for diversity alone. The published budget of LLaVA-NeXT's pictures is
    one for each crop, and here one for the whole picture.

    Args:
        theta: weight of relevance against diversity in (0, 1); None takes relevance as it is, the published default.
        inverted: count the least similar tokens as the most relevant, as published for the towers of CLIP, where
            patches that the text is about are less like it.
    """

    name = "cdpruner"
    theta: float | None = None
    inverted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 < self.theta < 1:
            raise ValueError(f"theta lies between 0 and 1, not {self.theta}")

    def chosen(self, tokens: Tokens, kept_B: Tensor, most: int) -> Tensor:
        valid_BI = candidates(tokens)
        relevance_BI = self._relevance(tokens, valid_BI)
        kernel = cosines(image_states(tokens)) * relevance_BI[:, :, None] * relevance_BI[:, None]
        return determinantal(kernel, valid_BI, kept_B, most)

    def _relevance(self, tokens: Tokens, valid_BI: Tensor) -> Tensor:
        image_BID = torch.nn.functional.normalize(image_states(tokens), dim=-1)
        assert tokens.states_BND is not None
        text_BTD = torch.nn.functional.normalize(tokens.states_BND[:, : tokens.text].float(), dim=-1)
        real_BT1 = tokens.valid_BN[:, : tokens.text, None]
        mean_BD = (text_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp_min(1)
        similarity_BI = (image_BID @ mean_BD[..., None])[..., 0] * (-1 if self.inverted else 1)
        low_B1 = similarity_BI.masked_fill(~valid_BI, torch.inf).amin(1, keepdim=True)
        high_B1 = similarity_BI.masked_fill(~valid_BI, -torch.inf).amax(1, keepdim=True)
        relevance_BI = (similarity_BI - low_B1 + 1e-6) / (high_B1 - low_B1).clamp_min(1e-6)
        if self.theta is not None:
            relevance_BI = (self.theta / (2 * (1 - self.theta)) * relevance_BI).exp()
        return torch.where(valid_BI, relevance_BI, 0.0)
