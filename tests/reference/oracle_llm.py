"""What a reduced decoder has to give: the unmodified model with the dropped tokens masked, from the
same layer on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

import pumer
from pumer.adapters import find
from pumer.adapters.decoder import kv_cache

Kept = dict[int, Tensor]


def decoder(model: nn.Module) -> nn.Module:
    """The language model."""
    return find(model).language(model)


def layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    return decoder(model).layers


def recounted(
    model: nn.Module,
    number: int,
    keep: Tensor,
    states: Tensor,
    position_ids: Tensor,
) -> dict[str, object]:
    """Positions for a layer of that number as if the other places of the prompt were not there."""
    gone = (~keep).long().cumsum(1)
    if states.shape[1] != keep.shape[1]:  # behind the prompt
        gone = gone[:, -1:]
    position_ids = position_ids - gone
    language = decoder(model)
    kind = (language.config.layer_types[number],) if "gemma3" in language.config.model_type else ()
    rotary = language.rotary_emb(states, position_ids, *kind)
    return {"position_ids": position_ids, "position_embeddings": rotary}


def kept(model: nn.Module, inputs: dict[str, Tensor], generating: bool = False) -> Kept:
    """Which places of the prompt every layer of a reduced model has, bool [B,S], by number.

    `generating`: as `generate` runs it, which counts no padding among the positions; sizes of keys
    depend on them.
    """
    if generating:
        settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        cache = kv_cache.find(model.generate(**inputs, **settings))
    else:
        with torch.no_grad():
            cache = kv_cache.find(model(**inputs, use_cache=True))
    batch, length = inputs["input_ids"].shape
    marks = {}
    for number in range(len(cache.layers)):
        held = kv_cache.layout(cache, number)
        if held is None:
            continue
        mark = torch.zeros(batch, length, dtype=torch.int64)
        filled = (
            torch.ones_like(held.position_BK) if held.filled_BK is None else held.filled_BK.long()
        )
        marks[number] = mark.scatter_add(1, held.position_BK, filled).bool()
    for number, source in enumerate(find(model).key_layers(model)):  # some read those of others
        if source in marks:
            marks[number] = marks[source]
    return marks


@contextmanager
def shortened(model: nn.Module, keep_S: Tensor, renumber: bool = False) -> Iterator[nn.Module]:
    """Give the language model of a stock model only these places of a prompt, bool [S], and all
    that comes behind it. Of one sample without padding, and without a cache.

    `renumber`: let positions count nothing else.
    """
    language = decoder(model)
    stock = language.forward

    def forward(**kwargs):
        embeddings = kwargs["inputs_embeds"]
        length = embeddings.shape[1]
        behind = torch.arange(len(keep_S), length)
        index = torch.cat([keep_S.nonzero()[:, 0], behind])
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(length)[None]
        kwargs["attention_mask"] = torch.ones(1, len(index), dtype=torch.int64)
        for name, value in kwargs.items():
            if name != "attention_mask" and isinstance(value, Tensor):
                value = value[..., index] if value.dtype == torch.int64 else value[:, index]
                kwargs[name] = value
        if renumber:
            kwargs["position_ids"] = torch.arange(len(index))[None]
        output = stock(**kwargs)
        states = output.last_hidden_state
        full = states.new_zeros(1, length, *states.shape[2:])
        full[:, index] = states
        output.last_hidden_state = full
        return output

    def count_anew(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"position_ids": torch.arange(args[0].shape[1])[None]}

    with ExitStack() as stack:
        if not find(model).keeps_positions:
            for layer in layers(model):
                handle = layer.register_forward_pre_hook(count_anew, with_kwargs=True)
                stack.callback(handle.remove)
        language.forward = forward
        stack.callback(delattr, language, "forward")
        yield model


@contextmanager
def masked(model: nn.Module, marks: Kept, renumber: bool = False) -> Iterator[nn.Module]:
    """Hide the other places of the prompt from every layer of a stock model, also in decoding.

    `renumber`: let every layer count positions as if they were not there.
    """
    assert pumer.active(model) is None

    def hide(number: int, keep: Tensor):
        def before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
            states, mask = args[0], kwargs["attention_mask"]
            batch, queries, _ = states.shape[-3:]  # of one stream, where there are several
            if mask is None:
                cache = kv_cache.find(kwargs)
                past = 0 if cache is None else cache.get_seq_length()
                if layer.self_attn.layer_idx > 0 and cache is not None:
                    past -= queries  # the first layer has been here
                keys = past + queries
                mask = torch.arange(keys) <= torch.arange(past, keys)[:, None]
                mask = mask.expand(batch, 1, queries, keys)
            hidden = ~keep
            if (
                mask.shape[3] < keep.shape[1] and queries == 1
            ):  # a sliding window shows the last keys alone
                counted = kv_cache.find(kwargs).get_seq_length() + (layer.self_attn.layer_idx == 0)
                hidden = hidden[:, counted - mask.shape[3] :]
            hidden = nn.functional.pad(hidden, (0, mask.shape[3] - hidden.shape[1]))[:, None, None]
            nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            if renumber:
                kwargs = kwargs | recounted(model, number, keep, states, kwargs["position_ids"])
            return args, kwargs | {"attention_mask": mask.masked_fill(hidden, nothing)}

        return before

    with ExitStack() as stack:
        for number, keep in marks.items():
            layer, hook = layers(model)[number], hide(number, keep)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield model
