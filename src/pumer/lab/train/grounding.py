"""Dense targets: what each patch shows, and whether the question asks about it.

Trained on answers alone, a small model predicts the prior for a long time. A loss at every patch
gets it started, as masked patch prediction does in ViLT's pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pumer.lab.scenes.drawing import COLOURS, SHAPES
from pumer.lab.tasks.prompts import IGNORED, image_tokens, is_generative
from pumer.lab.train.losses import grounding_loss
from pumer.reducers.plan import tokens_at


@dataclass
class GroundedOutput(ModelOutput):
    """Logits [B,L], or [B,S,V] and their loss for generative models, and the grounding loss."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    grounding_loss: Tensor | None = None


class Grounded(nn.Module):
    """A joint encoder or LLaVA with a linear head on its image tokens, used while it is trained on
    dense targets.

    `forward` takes the model's inputs and `patch_labels` int64 [B,P,7] (see `grounding_loss`; in
    raster order) and returns the logits and the `grounding_loss`. The active reducer must not
    shorten the image.

    In a LLaVA's prompt the image precedes the question, so its tokens cannot depend on it. There
    every patch is classified together with its product with the last token of the question: what a
    later layer's attention can compute from the two.

    Args:
        layer: number of layers before the head, in METER fusion layers, in
            BridgeTower cross-modal ones. Not the last one: no later layer could then use what the
            patches have learned.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        config = model.config.get_text_config() if is_generative(model) else model.config
        self.depth, width = config.num_hidden_layers, config.hidden_size
        if not 1 <= layer <= self.depth:
            raise ValueError(f"grounding.layer is {layer}; the model has layers 1 to {self.depth}")
        self.model, self.config, self.layer = model, model.config, layer
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 3, 3, 3, 2)
        self.asks = nn.Linear(width, width) if is_generative(model) else None
        self.head = nn.Linear(width if self.asks is None else 2 * width, sum(self.sizes))

    def forward(self, patch_labels: Tensor | None = None, **inputs: Any) -> Any:
        """The model's output, with `grounding_loss` if there are `patch_labels`."""
        if patch_labels is None:
            return self.model(**inputs)
        output = self.model(**inputs, output_hidden_states=True)
        # Some return the states before the first layer as well.
        hidden = output.hidden_states[self.layer - self.depth - 1]
        states = (
            self._of_encoder(hidden, patch_labels)
            if self.asks is None
            else self._of_decoder(hidden, inputs)
        )
        loss = grounding_loss(self.head(states).split(self.sizes, dim=-1), patch_labels)
        return GroundedOutput(loss=output.get("loss"), logits=output.logits, grounding_loss=loss)

    def _of_encoder(self, hidden: Tensor, patch_labels: Tensor) -> Tensor:
        """Image tokens that have attended to the question: [B,P,D]."""
        states = hidden[:, -patch_labels.shape[1] :]
        if hasattr(self.model.base_model, "layernorm"):  # other layers include their norms
            states = self.model.base_model.layernorm(states)
        return states

    def _of_decoder(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Image tokens beside their product with the question: [B,P,2D]."""
        assert self.asks is not None
        hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:])
        first = (inputs["input_ids"] == self.config.image_token_id).int().argmax(1, keepdim=True)
        patches = first + torch.arange(image_tokens(self.config), device=hidden.device)
        last = (inputs["labels"] != IGNORED).int().argmax(1, keepdim=True) - 1
        image, question = (tokens_at(hidden, at) for at in (patches, last))
        return torch.cat([image, image * self.asks(question)], dim=-1)
