"""What the hooks need to know of a family of decoders: where its parts are, and what they mean.

Shape suffixes: B samples, S tokens of the prompts.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.prompt import Picture
from pumer.adapters.decoder.vision import Tiles


class DecoderSpec(Protocol):
    """A family as the hooks see it; `family.DecoderAdapter` says what each member is."""

    @property
    def causal(self) -> bool: ...
    @property
    def merger(self) -> str: ...
    @property
    def on_host(self) -> tuple[str, ...]: ...
    @property
    def projects_tokens(self) -> bool: ...

    # Parts of a model.
    def trunk(self, model: nn.Module) -> Any: ...
    def language(self, model: nn.Module) -> Any: ...
    def projector(self, model: nn.Module) -> nn.Module: ...
    def tower_attention(self, model: nn.Module) -> Any: ...
    def last_attention(self, model: nn.Module) -> Any: ...

    # Images, behind the vision tower and in the prompt.
    def image_facts(self, trunk: Any, captured: Captured) -> dict[str, Tensor]: ...
    def pictures(self, trunk: Any, output: Any, captured: Captured) -> list[Picture]: ...
    def tiles(
        self, trunk: Any, image_BS: Tensor, features: int, inputs: dict[str, Any]
    ) -> Tiles | None: ...
    def marks(
        self, trunk: Any, input_ids: Tensor | None, embeddings: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...
    def no_text(
        self, trunk: Any, image_BS: Tensor, joined: Tiles | None, inputs: dict[str, Any]
    ) -> Tensor: ...

    def install(self, patch: Patch, model: nn.Module, capture: Any) -> None: ...
