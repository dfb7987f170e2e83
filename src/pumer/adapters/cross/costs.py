"""What models cost whose readers look at a memory by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from pumer.adapters.decoder.costs import DecoderCosts, linear_weights
from pumer.adapters.decoder.parts import DEFAULT_TEXT

CROSS = (
    "cross_attn",
    "crossattention",
    "encoder_attn",
    "encoder_decoder_attention",
    "x_attn",
)
"""How layers call the attention by which they read a memory."""
SELF = ("self_attn", "attention", "self_attention", "attn")
"""And that to their own tokens."""
QUERIES = ("q_proj", "query", "q", "query_proj")
OF_MEMORY = ("k_proj", "v_proj", "key", "value", "k", "v")
"""The layers in an attention that take the tokens of a memory, in place of the reader's own."""


class CrossCosts(DecoderCosts):
    """Multiply-accumulates of every part, for one image and one text."""

    decodes = False
    crossing: ClassVar[tuple[str, ...]] = CROSS
    """How layers call the attention by which they read a memory; empty where they are it."""
    queries_are_keys: ClassVar[bool] = False
    """Whether that attention also looks at the reader's own tokens."""
    projects_remaining: ClassVar[bool] = False
    """Whether the projector takes the tokens that are left, in place of all of them."""

    def before(self, model: nn.Module) -> int:
        """Tokens at the head of a memory that are no image's, such as [CLS]."""
        return int(self.has_class_token(model))

    def memory_length(self, model: nn.Module, image: int) -> int:
        """Tokens of a memory with that many image tokens: [CLS] and the like are among them."""
        crops, _ = self.tower_entry(model, image)
        return image + crops * self.before(model)

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        """(attention, MLP) of every layer of the readers: `text` are the reader's own tokens, and
        keys and values are those of the memory in layers with cross-attention."""
        result = []
        for layer, (text, image) in zip(self.layers(model), lengths[:-1], strict=True):
            length = self.memory_length(model, image) + text * int(self.queries_are_keys)
            crossing = _parts(layer, self.crossing) if self.crossing else [layer]
            self_attentions = [part for part in _parts(layer, SELF) if part not in crossing]
            attention = text * sum(map(linear_weights, self_attentions))
            attention += sum(2 * text**2 * _width(module) for module in self_attentions)
            for module in crossing:
                of_memory = sum(
                    linear_weights(part)
                    for name, part in module.named_modules()
                    if name.rpartition(".")[2] in OF_MEMORY
                )
                attention += text * (linear_weights(module) - of_memory) + length * of_memory
                attention += 2 * text * length * _width(module)
            mlp = linear_weights(layer) - sum(map(linear_weights, (*self_attentions, *crossing)))
            result.append((attention, text * mlp))
        return result

    def writer(self, model: nn.Module) -> Any:
        """The language model behind the readers; None where it is the reader itself."""
        return None

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Costs up to the first token of the answer: of the head, that token's alone."""
        _, image = entry or lengths[0]
        text, remaining = lengths[0]
        layers = self.layer_macs(model, lengths)
        vision, projection = self.vision_macs(model, image, tower)
        if self.projects_remaining:
            projection = self.memory_length(model, remaining) * linear_weights(
                self.projector(model)
            )
        parts = {
            "embedding": 0,
            "vision tower": vision,
            "projection": projection,
            "attention": sum(attention for attention, _ in layers),
            "mlp": sum(mlp for _, mlp in layers),
        }
        output: Any = getattr(model, "get_output_embeddings", None)
        writer, head = self.writer(model), None if output is None else output()
        if writer is not None:
            # It gets the queries of the readers, and the words.
            count, of_head = text + DEFAULT_TEXT, set() if head is None else set(head.modules())
            weights = sum(
                part.in_features * part.out_features
                for part in writer.modules()
                if isinstance(part, nn.Linear) and part not in of_head
            )
            pairs = sum(2 * count**2 * _width(module) for module in _attentions(writer))
            parts["language model"] = count * weights + pairs
        return parts | {"head": 0 if head is None else linear_weights(head)}


def _attentions(module: nn.Module) -> Iterator[nn.Module]:
    """Every attention inside of a module."""
    return (part for part in module.modules() if _queries(part) is not None)


def _queries(module: nn.Module) -> nn.Linear | None:
    parts = (getattr(module, name, None) for name in QUERIES)
    return next((part for part in parts if isinstance(part, nn.Linear)), None)


def _width(module: nn.Module) -> int:
    """Channels of the queries of an attention, of all heads together."""
    return sum(queries.out_features for part in module.modules() if (queries := _queries(part)))


def _parts(layer: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    parts = (getattr(layer, name, None) for name in names)
    return [part for part in parts if isinstance(part, nn.Module)]
