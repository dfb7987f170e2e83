"""Models that read images by cross-attention: the base of every family, which is a short spec of
what is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.cross import reader as cross
from pumer.adapters.cross.costs import CrossCosts
from pumer.adapters.cross.memory import MemoryImages
from pumer.adapters.cross.reader import Inputs, Readers, Reading
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import ImageSpan
from pumer.adapters.decoder.vision import (
    CLASS_ATTENTION,
    LAST_CLASS_ATTENTION,
    vision_features,
)
from pumer.reducers import EMBEDDINGS, Reducer
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Encoder, Grid


class CrossAdapter(CrossCosts):
    """A stock model of transformers whose image tokens are no words of a prompt.

    They are chosen once, between the encoder and what reads it.
    """

    memory: ClassVar[str] = "encoder_hidden_states"
    """The argument by which a reader takes the encoder's output, [B,L,D]."""
    mask: ClassVar[str | None] = "encoder_attention_mask"
    """And its mask; None where it takes none."""
    heeds_mask: ClassVar[bool] = True
    """Whether readers leave out what the mask hides."""
    wide_mask: ClassVar[bool] = False
    """Whether that mask is [B,1,Q,L], in place of [B,L]."""
    padded: ClassVar[bool] = False
    """Whether the memory has padding, of which the mask tells."""
    reads_tower: ClassVar[bool] = True
    """Whether what the vision tower knows of patches can be read."""

    def readers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules that read the encoder's output."""
        raise NotImplementedError

    def scopes(self, model: nn.Module) -> Sequence[tuple[nn.Module, str]]:
        """Methods (module, name) inside of which the encoder runs and is read."""
        return [(self.trunk(model), "forward")]

    def projector(self, model: nn.Module) -> nn.Module:
        return nn.Identity()

    def behind(self, model: nn.Module) -> int:
        """Tokens at the end of a memory that are no image's."""
        return 0

    def real(self, memory_BLD: Tensor, mask: Any, inputs: Inputs) -> Tensor | None:
        """Which tokens of a memory are no padding, bool [B,L]; None for all.

        Args:
            mask: of the reader.
            inputs: of the scope.
        """
        return mask.bool() if self.padded and mask is not None else None

    def memory_width(self, model: nn.Module) -> int:
        """Channels of the encoder's output."""
        _, width, _ = self.tower_shape(model)
        return width

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        return 1, self.memory_width(model)

    def tower_attentions(self, model: nn.Module) -> dict[int, Any]:
        return super().tower_attentions(model) if self.reads_tower else {}

    def text_length(self, model: nn.Module, inputs: Inputs) -> int:
        """Tokens by which a reader looks at the memory, from its arguments."""
        names = ("input_ids", "inputs_embeds", "hidden_states", "query_embeds")
        values = (inputs.get(name) for name in names)
        tokens = next((value for value in values if value is not None), None)
        return self.default_lengths(model)[0] if tokens is None else tokens.shape[1]

    def grids(
        self, model: nn.Module, token_rows: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Grid | None]:
        """Rows and columns of the patches of every row's image, None where they are no grid.

        Args:
            token_rows: which patches of each are real, on the host.
            inputs: of the scope.
        """
        rows, columns = self.default_grid(model)
        return [
            (rows, columns) if rows * columns == len(index_I) else None for index_I in token_rows
        ]

    def images(
        self, readers: Readers, memory_BLD: Tensor, mask: Any, inputs: Inputs
    ) -> MemoryImages:
        """The images in a memory: one in every row, behind any [CLS]."""
        (batch, length), model = memory_BLD.shape[:2], readers.model
        before, behind = self.before(model), self.behind(model)
        end = length - behind
        place_L = torch.arange(length, device=memory_BLD.device)
        patch_BL = ((place_L >= before) & (place_L < end)).expand(batch, -1)
        real_BL = self.real(memory_BLD, mask, readers.inputs)
        token_rows = [torch.arange(end)] * batch
        if real_BL is not None:
            patch_BL = patch_BL & real_BL
            token_rows = [real_L.nonzero()[:, 0] for real_L in real_BL[:, :end].cpu()]
        patch_rows = [index_P[before:] for index_P in token_rows]
        grids = self.grids(model, patch_rows, readers.inputs)
        spans = [
            ImageSpan(
                len(index_I),
                grid=grid,
                encoder=self.encoder(readers, memory_BLD, row, token_rows[row]),
            )
            for row, (index_I, grid) in enumerate(zip(patch_rows, grids, strict=True))
        ]
        structure = [before + behind] * batch
        return MemoryImages(spans, list(range(batch)), patch_BL, structure, real_BL)

    def encoder(
        self, readers: Readers, memory_BLD: Tensor, row: int, index_P: Tensor
    ) -> Encoder | None:
        """What the vision tower knows of the image in a row; `index_P` are its tokens, [CLS] among
        them."""
        captured = captured_for(readers)
        if captured is None:
            return None
        copies = len(memory_BLD) // len(captured.heads[-1][0]) if captured.heads else 1
        index_P = index_P.to(memory_BLD.device)
        features = memory_BLD[row : row + 1].index_select(1, index_P)
        of_image = at_tokens(captured, row // copies, index_P, features)
        first = self.has_class_token(readers.model)
        return Encoder(**vision_features(of_image, first, self.before(readers.model)))

    def read(self, readers: Readers, reader: Any, stock: Reading, inputs: Inputs) -> Any:
        """A reader's call with the reducer active."""
        return cross.read(readers, reader, stock, inputs)

    def shape(self, model: nn.Module) -> ModelShape:
        attentions = self.tower_attentions(model)
        return replace(
            super().shape(model),
            proportional=False,
            encoder=True,
            co_attention=None,
            encoder_depth=max(attentions, default=0),
            encoder_layers=tuple(attentions),
        )

    def check(self, reducer: Reducer) -> None:
        traits = reducer.traits
        if any(layer != EMBEDDINGS for layer in reducer.layers or ()):
            raise ValueError(
                f"{reducer.name} acts in layers that hold the image's tokens. {self.family} reads "
                "them by cross-attention, so they are chosen once, before: give layers=(-1,), or "
                "take a method that acts before the first layer, such as DivPrune"
            )
        if traits.needs_text:
            raise ValueError(
                f"{reducer.name} is guided by the words, which are no neighbours of the image's "
                f"tokens in {self.family}: take a method that looks at the image alone, such as "
                "DivPrune"
            )
        if traits.drops_image:
            raise ValueError(
                f"{reducer.name} leaves nothing that {self.family} could read: keep some tokens"
            )
        if traits.needs_encoder - {"features_BND"} and not self.reads_tower:
            raise ValueError(
                f"{reducer.name} asks what the vision tower knows of patches, which cannot be read "
                f"in {self.family}: take a method that compares features, such as DivPrune"
            )
        if traits.dynamic_length and not self.heeds_mask:
            raise ValueError(
                f"{reducer.name} keeps more of one image than of another, and what reads them in "
                f"{self.family} heeds no mask: take a method with a fixed number, such as DivPrune"
            )

    def patch(self, model: nn.Module, patch: Patch) -> None:
        needs_class = {CLASS_ATTENTION, LAST_CLASS_ATTENTION} & patch.traits.needs_encoder
        if needs_class and not self.has_class_token(model):
            raise ValueError(
                f"{patch.reducer.name} asks what [CLS] attends to, and the vision tower of "
                f"{type(model).__name__} has no [CLS] for the whole image: methods that take "
                'saliency="received" do without'
            )
        Readers(patch, self, model)


def grids_of_flattened(token_rows: Sequence[Tensor], inputs: Inputs) -> list[Grid | None]:
    """Grids of patches that come with their row and column, counted from 1; arguments as for
    `CrossAdapter.grids`."""
    patches = inputs.get("flattened_patches")
    if patches is None:
        return [None] * len(token_rows)
    largest = patches[..., :2].amax(1).long().tolist()
    copies = len(token_rows) // len(largest)
    grids = [(rows, columns) for rows, columns in largest for _ in range(copies)]
    return [
        grid if grid[0] * grid[1] == len(index_I) else None
        for grid, index_I in zip(grids, token_rows, strict=True)
    ]


def captured_for(readers: Readers) -> Captured | None:
    """What this call has captured of the tower; None where nothing is needed.

    Raises:
        ValueError: where the tower's attention is needed and has not run in this call.
    """
    capture = readers.capture
    if not capture.needs:
        return None
    captured = capture.current
    if capture.needs - {"features_BND"} and (captured is None or not captured.heads):
        raise ValueError(
            f"{readers.patch.reducer.name} asks what the vision tower knows of the image, which "
            "did not run in this call: give the image itself, in place of what was encoded before"
        )
    return Captured(capture, capture.needs) if captured is None else captured


def at_tokens(captured: Captured, row: int, index_P: Tensor, features_1PD: Tensor) -> Captured:
    """The same of one image alone: some tokens of a row of the tower, and their features."""

    def cut(heads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                queries[row : row + 1].index_select(2, index_P.to(queries.device)),
                keys[row : row + 1].index_select(2, index_P.to(keys.device)),
            )
            for queries, keys in heads[-1:]
        ]

    return replace(
        captured,
        features=[features_1PD.detach()],
        heads=cut(captured.heads),
        middle_heads=cut(captured.middle_heads),
        last_heads=cut(captured.last_heads),
    )
