"""Ways to call a model, for tests that look from outside: what is public, and stock models to
compare with."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny
import tiny_llm
import torch
from tiny_llm import IMAGE, Inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pumer
from pumer import DivPrune, FastV, PuMer

PLACES = {
    "before": DivPrune(keep=0.5),
    "inside": FastV(keep=0.5, layer=1),
    "merging": PuMer(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 1)),
}
"""A reducer for every place where one may act."""
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": list(range(50, 60))}
"""How `generate` is called here: no placeholders in answers."""


def model(family: str, attention: str = "sdpa") -> nn.Module:
    """A new tiny model of any family, encoder or decoder."""
    if family in tiny.FAMILIES:
        return tiny.model(tiny.FAMILIES[family])
    return tiny_llm.model(family, attention)


def inputs(family: str, seed: int = 3, rows: int = 1) -> Inputs:
    """A batch for a family; its seed decides on images and words, and on lengths where it may."""
    generator = torch.Generator().manual_seed(seed)
    if family in tiny.FAMILIES:
        batch = tiny.batch(tiny.FAMILIES[family], rows=rows)
        noise = torch.randn(batch["pixel_values"].shape, generator=generator)
        pixels = batch["pixel_values"] + noise * batch["pixel_mask"][..., None, :, :]
        return batch | {"pixel_values": pixels}
    batch = tiny_llm.batch(family, ((4, "i", 5 + seed % 3), (2, "i", 3))[:rows], seed=seed)
    words = torch.randint(2, 50, batch["input_ids"].shape, generator=generator)
    ids = batch["input_ids"]
    is_word = (ids > 1) & (ids < 50)  # the others mean something, or are padding
    return batch | {"input_ids": torch.where(is_word, words, ids)}


def answer(model: nn.Module, batch: Inputs, **more: Any) -> Tensor:
    """What one forward says: an encoder's logits, a decoder's for the next token, [B,*]."""
    with torch.no_grad():
        logits = model(**batch, **more).logits
    return logits if logits.ndim == 2 else logits[:, -1]


def generated(model: nn.Module, batch: Inputs, **more: Any) -> list[list[int]]:
    """The tokens that a decoder writes behind its prompts."""
    ids = model.generate(**batch, **(GREEDY | more))
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument by which a forward takes a cache: transformers has changed its name."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache that a forward gives back."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def image_lengths(model: nn.Module) -> tuple[int, int]:
    """Image tokens of the last forward, before everything and after it."""
    patch = pumer.active(model)
    assert patch is not None
    assert patch.entry is not None
    return patch.entry[1], patch.lengths[-1][1]


def kept_places(model: nn.Module, row: int = 0) -> list[int]:
    """Places of the prompt that the last forward left in one row, in order, padding of the list
    taken off."""
    kept_BK = pumer.kept(model)
    assert kept_BK.dtype == torch.int64
    assert kept_BK.ndim == 2
    return sorted(place for place in kept_BK[row].tolist() if place >= 0)


def kept_patches(model: nn.Module, ids_BS: Tensor, row: int = 0) -> list[int]:
    """Those of them that are image placeholders in a prompt (with the cached part in front)."""
    return [place for place in kept_places(model, row) if ids_BS[row, place] == IMAGE]


def calls_of(modules: Sequence[nn.Module]) -> tuple[list[str], list[Any]]:
    """A list that fills with the names of the modules that run, and the hooks to take off again."""
    seen: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        seen.append(type(module).__name__)

    return seen, [module.register_forward_pre_hook(note) for module in modules]


@contextmanager
def counted(modules: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Names of the modules that run inside the with block."""
    seen, handles = calls_of(modules)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def in_threads(
    model: nn.Module,
    users: Sequence[Inputs],
    calls: int,
    ask: Callable[[nn.Module, Inputs], Any] = answer,
    right: Callable[[Any, Any], bool] = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-4),
) -> Counter[str]:
    """How the calls of users went that all ask one model at once, one thread each."""
    alone = [ask(model, user) for user in users]
    counts: Counter[str] = Counter()
    start = threading.Barrier(len(users))

    def work(user: Inputs, expected: Any) -> None:
        start.wait()
        for _ in range(calls):
            try:
                counts["right" if right(ask(model, user), expected) else "wrong"] += 1
            except Exception as error:  # what went wrong is what is counted
                counts[f"{type(error).__name__}: {str(error)[:60]}"] += 1

    threads = [threading.Thread(target=work, args=pair) for pair in zip(users, alone, strict=True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # tiny models else finish before another thread has its turn
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return counts


def must_say(error: Exception, *words: str) -> None:
    """Raise an error again unless its message has all these words."""
    if not all(word in str(error) for word in words):
        raise error


class Largest(TorchFunctionMode):
    """Notes the bytes of the largest tensor made."""

    size = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes())
        return result


def flash(
    module: nn.Module,
    queries_BHNC: Tensor,
    keys_BHNC: Tensor,
    values_BHNC: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands for transformers' flash attention.

    Its samples begin where `position_ids` are 0 or where `cu_seq_lens_q` say, and a sliding window
    counts the tokens that it is given, not their positions.
    """
    queries, keys = queries_BHNC.shape[2], keys_BHNC.shape[2]
    row = torch.arange(keys - queries, keys)[:, None]
    column = torch.arange(keys)[None]
    allowed = column <= row
    if kwargs.get("sliding_window"):
        allowed &= column > row - kwargs["sliding_window"]
    if queries == keys:
        starts = kwargs.get("cu_seq_lens_q")
        positions = kwargs.get("position_ids")
        sample = None
        if starts is not None:
            sample = torch.bucketize(torch.arange(keys), starts, right=True)
        elif positions is not None:
            positions = positions[0] if positions.ndim == 3 else positions
            sample = (positions[0] == 0).cumsum(0)
        if sample is not None:
            allowed &= sample[:, None] == sample
    groups = queries_BHNC.shape[1] // keys_BHNC.shape[1]
    keys_BHNC, values_BHNC = (x.repeat_interleave(groups, 1) for x in (keys_BHNC, values_BHNC))
    context = nn.functional.scaled_dot_product_attention(
        queries_BHNC, keys_BHNC, values_BHNC, allowed, scale=module.scaling
    )
    return context.transpose(1, 2), None


def use_flash(monkeypatch: Any, language_model: nn.Module) -> None:
    """Let a language model attend by that function, under flash attention's name."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    config = language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")


def alive(tensor: Tensor) -> weakref.ref[Tensor]:
    """A reference that does not keep a tensor alive."""
    return weakref.ref(tensor)


def instance_state(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """What hangs on every module: names of its attributes and how many hooks it has."""
    state = {}
    for name, module in model.named_modules():
        hooks = [
            f"{key}:{len(value)}"
            for key, value in vars(module).items()
            if "hooks" in key and isinstance(value, dict)
        ]
        state[name] = (*sorted(vars(module)), *hooks)
    return state


def copied(batch: Inputs) -> Inputs:
    """The same tensors anew."""
    return copy.deepcopy(batch)
