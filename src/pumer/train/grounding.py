"""Dense targets: what is under each patch, and whether the question means it.

On answers alone a small model stays at the prior for long; a loss at every patch gets it off, as patch prediction
does in ViLT's own pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pumer.data.scenes import COLOURS, SHAPES
from pumer.train.losses import grounding_loss


@dataclass
class GroundedOutput(ModelOutput):
    """Logits [B,L] and the grounding loss."""

    logits: Tensor | None = None
    grounding_loss: Tensor | None = None


class Grounded(nn.Module):
    """A ViLT or METER with a linear head on its image tokens, for as long as it is trained on dense targets.

    `forward` takes the model's inputs and `patch_labels` int64 [B,P,7] (see `grounding_loss`; in raster
    order), and gives the logits and the `grounding_loss`. The reducer in force must not shorten the image.

    Args:
        layer: number of layers, in METER fusion layers, before the head. Not the last one: what a patch knows only
            then, no token can read.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        super().__init__()
        depth = model.config.num_hidden_layers
        if not 1 <= layer <= depth:
            raise ValueError(f"grounding.layer is {layer}; the model has layers 1 to {depth}")
        self.model, self.config, self.layer = model, model.config, layer
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 3, 3, 3, 2)
        self.head = nn.Linear(model.config.hidden_size, sum(self.sizes))

    def forward(self, patch_labels: Tensor | None = None, **inputs: Any) -> Any:
        if patch_labels is None:
            return self.model(**inputs)
        output = self.model(**inputs, output_hidden_states=True)
        states = output.hidden_states[self.layer][:, -patch_labels.shape[1] :]
        if hasattr(self.model.base_model, "layernorm"):  # METER's layers end with their norms
            states = self.model.base_model.layernorm(states)
        loss = grounding_loss(self.head(states).split(self.sizes, dim=-1), patch_labels)
        return GroundedOutput(logits=output.logits, grounding_loss=loss)
