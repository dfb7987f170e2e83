"""Seam C: inside the layers of a language model, and the way of a whole prompt through a reduced one.

Everything goes through hooks on the instance. A reduction "after layer k" happens before layer k + 1 runs, with the
queries and keys of layer k; `EMBEDDINGS` is before layer 0. The model itself goes on counting unreduced tokens: masks
and rotary embeddings are made by it in full and cut here, layer by layer, and so the cache's (`kv_cache`).

Shape suffixes: B samples, S tokens of the prompt, K tokens of the layer, N tokens of a view, D channels, H heads,
C channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pumer.adapters import before_llm, decoder_attention, kv_cache, reduce_llm
from pumer.adapters.base import Patch, exact, replace_method
from pumer.adapters.before_llm import Look, comparable
from pumer.adapters.prompt import Axis, Picture, Run, gather

if TYPE_CHECKING:
    from pumer.adapters.llm import DecoderAdapter


IGNORED = -100
"""Label of tokens that are not learned."""
_PICTURES = "_pumer_pictures"


class Reduction:
    """A reducer at work in one model: the hooks, and what one forward hands from each to the next."""

    def __init__(self, patch: Patch, spec: DecoderAdapter, model: nn.Module) -> None:
        self.patch, self.spec = patch, spec
        self.trunk: Any = spec.trunk(model)
        self.language: Any = spec.language(model)
        self.run: Run | None = None
        self.told: dict[str, Any] = {}
        """What the whole model was called with."""
        self.pictures: list[Picture] = []
        self.tower = Look()
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        patch, spec, reducer = self.patch, self.spec, self.patch.reducer
        if model is not self.trunk:
            self._stand_in(model, "forward", _forward, model.forward, inspect.signature(model.forward))
        patch.hook(self.trunk.register_forward_pre_hook(self._enter, with_kwargs=True))
        patch.hook(self.language.register_forward_hook(self._leave))
        for number, layer in enumerate(self.language.layers):
            patch.hook(layer.register_forward_pre_hook(partial(self._before, number), with_kwargs=True))
            if reducer.reduces_at(number):
                decoder_attention.watch(patch, layer.self_attn, partial(self._see, number))
        self.tower.install(patch, spec, model, reducer.needs)
        self._stand_in(self.trunk, "get_image_features", _features)
        if hasattr(self.trunk, "get_video_features"):
            self._stand_in(self.trunk, "get_video_features", _videos)
        if spec.merger == "get_placeholder_mask":
            replace_method(patch, self.trunk, spec.merger, _placeholders, self)
        else:
            replace_method(patch, self.trunk, spec.merger, _merger, self)
        spec.install(patch, model, self.tower)
        if hasattr(self.language, "_deepstack_process"):
            replace_method(patch, self.language, "_deepstack_process", _deepstack, self)

    def _stand_in(self, owner: Any, name: str, method: Any, *bound: Any) -> None:
        """Replace a method by one with the same signature, from which others read which inputs there are."""
        signature = inspect.signature(getattr(owner, name))
        replace_method(self.patch, owner, name, method, self, *bound)
        getattr(owner, name).__signature__ = signature

    def start(self, image_BS: Tensor, features: int) -> None:
        """Take in the prompts, whose placeholders are marked: the one place where the host reads from the device.

        Args:
            image_BS: bool, the placeholders.
            features: how many of them the images fill.

        Raises:
            ValueError: for placeholders that do not match the images, and inputs that cannot be reduced.
        """
        run, spec = self.run, self.spec
        assert run is not None
        kv_cache.check(run.inputs.get("past_key_values"))
        mask = run.inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("a reduced model takes a two-dimensional attention_mask, 1 for tokens and 0 for padding")
        batch, run.length = image_BS.shape
        real_BS = torch.ones_like(image_BS) if mask is None else mask[:, -run.length :].to(image_BS.device).bool()
        tiles = spec.tiles(self.trunk, image_BS, features, run.inputs)
        text_BS = real_BS & ~spec.no_text(self.trunk, image_BS, tiles, run.inputs)
        # What is being learned or checked must not guide what is kept.
        question_BS = text_BS
        if run.labels is not None:
            question_BS = question_BS & (run.labels.to(text_BS.device) == IGNORED)
        if run.drafts:
            question_BS = question_BS & (torch.arange(run.length, device=text_BS.device) < run.length - run.drafts)
        if question_BS is not text_BS:
            text_BS = torch.where(question_BS.any(1, keepdim=True), question_BS, text_BS)
        text_BS = text_BS & image_BS.any(1, keepdim=True)  # a prompt without images is left alone
        asked = [text_BS.sum(1), image_BS.sum(1), *([] if tiles is None else [tiles.joined_P.long()])]
        numbers = torch.cat(asked).tolist()
        texts, images, joined = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch :]

        run.pictures, run.owner = before_llm.assign(self.pictures, images)
        if tiles is not None:
            run.pictures, run.owner = before_llm.join(run.pictures, run.owner, joined)
        counts = [[text, 0] for text in texts]
        for picture, row in zip(run.pictures, run.owner, strict=True):
            counts[row][1] += picture.patches
        run.rest = [run.length - text - image for text, image in counts]
        run.axis = Axis(
            index_BK=torch.arange(run.length, device=image_BS.device).expand(batch, run.length),
            filled_BK=None,
            text_BK=text_BS,
            image_BK=before_llm.patches(image_BS, run.pictures),
            sizes_BK=torch.ones(batch, run.length, device=image_BS.device),
            counts=tuple((text, image) for text, image in counts),
        )
        grids = {picture.grid for picture in run.pictures}
        self.patch.entry = (*run.axis.lengths, grids.pop() if len(grids) == 1 else None)

    def _enter(self, trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(trunk.forward).bind_partial(*args, **kwargs).arguments
        inputs, told, self.told = given | given.get("kwargs", {}), self.told, {}
        # Assisted generation and prompt lookup draft before the prefill, and ask for the logits of the drafts. Others
        # who ask for several logits of a prompt do so without a cache; their last words are words of the question.
        asked = told.get("logits_to_keep") if inputs.get("past_key_values") is not None else None
        self.run = Run(inputs, told.get("labels"), max(asked - 1, 0) if isinstance(asked, int) else 0)
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            self.pictures = getattr(encoded, _PICTURES, [])
            if not self.pictures:
                raise ValueError(
                    "nothing is known of the images in mm_encoder_outputs: give what get_image_features returns while "
                    "this reducer is in force, all in one prefill (leave prefill_chunk_size unset)"
                )

    def _see(self, number: int, queries_BHKC: Tensor, keys_BHKC: Tensor) -> None:
        run = self.run
        if run is None or run.axis is None or len(run.axes) != number + 1:
            return  # nothing to reduce, or the layer is being computed again for its gradients
        attention = self.language.layers[number].self_attn
        run.seen[number] = comparable(attention, queries_BHKC, keys_BHKC[:, :, -queries_BHKC.shape[2] :])

    def _before(self, number: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a layer: reduce after the one before it, and cut what goes along with the tokens."""
        run = self.run
        if run is None:
            return None
        cache, states = kwargs.get("past_key_values"), args[0] if args else kwargs["hidden_states"]
        if number == 0:
            run.past, run.length = kv_cache.length(cache), states.shape[1]
        if run.axis is not None:
            states = reduce_llm.reduce(self.patch, run, number - 1, states, self.spec.causal)
            run.axes.append(run.axis)
            run.widths.append(states.shape[1])
        axis = None if run.axis is None or run.axis.whole else run.axis
        held = kv_cache.held(cache, number)
        if axis is None and held is None:
            return None
        mask = kwargs.get("attention_mask")
        cut = partial(self._cut, run, number, mask, axis, cache, held, states)
        kwargs = kwargs | {"attention_mask": run.once((mask, axis, held), cut)}
        if axis is not None:
            for name in ("position_embeddings", "position_ids"):
                whole = kwargs.get(name)
                kwargs[name] = run.once((whole, axis), partial(gather, whole, axis.index_BK, run.length))
            if self.language.config._attn_implementation.startswith("flash"):
                kwargs["position_ids"] = None  # whose gaps it would take for ends of packed sequences
        if not args:
            return (), kwargs | {"hidden_states": states}
        return (states, *args[1:]), kwargs

    def _cut(
        self,
        run: Run,
        number: int,
        mask: Any,
        axis: Axis | None,
        cache: Any,
        held: kv_cache.Held | None,
        states: Tensor,
    ) -> Any:
        """The attention mask of a layer, for the tokens it has and those that its cache holds."""
        columns_BK, filled_BK = _places(axis, run, states)
        offset = 0
        if run.past:
            layer = cache.layers[number]
            _, offset = layer.get_mask_sizes(run.length)
            columns_BK, filled_BK = kv_cache.before(held, run.past, layer.keys.shape[-2], columns_BK, filled_BK)
        return decoder_attention.cut_mask(
            mask,
            None if axis is None else axis.index_BK,
            columns_BK,
            filled_BK,
            offset,
            run.past,
            run.length,
            self.language.config._attn_implementation,
            states.dtype,
        )

    def _leave(self, _: nn.Module, args: Any, output: Any) -> Any:
        """After the last layer: states in the prompt's length again, and the cache told what it holds."""
        run, self.run = self.run, None
        if run is None or not run.axes:
            return None
        last = run.axes[-1]
        self._note(run)
        cache = output.past_key_values
        if cache is not None:
            kv_cache.write(cache, self._held(run, cache))
        if last.whole:
            return None
        output.last_hidden_state = _spread(output.last_hidden_state, last, run.length)
        if output.get("hidden_states") is not None:
            axes = (run.axes[0], *run.axes)
            output.hidden_states = tuple(
                None if states is None else _spread(states, axis, run.length)
                for states, axis in zip(output.hidden_states, axes, strict=True)
            )
        return output

    def _note(self, run: Run) -> None:
        """Keep the lengths of the sample with the most tokens: those planned, and those that there really were."""
        self.patch.planned, self.patch.lengths = [], []
        for axis, width in zip((*run.axes, run.axes[-1]), (*run.widths, run.widths[-1]), strict=True):
            more = width - max(rest + sum(count) for rest, count in zip(run.rest, axis.counts, strict=True))
            text, image = max(axis.counts, key=sum)
            self.patch.planned.append((text, image))
            self.patch.lengths.append((text, image + more))

    def _held(self, run: Run, cache: Any) -> dict[int, kv_cache.Held]:
        """What every layer with fewer tokens holds after this run."""
        made: dict[Any, kv_cache.Held] = {}
        result = {}
        for number, axis in enumerate(run.axes):
            if axis.whole or number >= len(cache.layers) or not cache.layers[number].is_initialized:
                continue
            held = kv_cache.held(cache, number)
            key = id(axis), id(held)
            if key not in made:  # layers that hold the same share one, and one mask
                places = axis.index_BK + run.past, axis.filled_BK
                if run.past:
                    places = kv_cache.before(held, run.past, None, *places)
                made[key] = kv_cache.Held(*places, run.past + run.length)
            result[number] = made[key]
        return result


def _places(axis: Axis | None, run: Run, states: Tensor) -> tuple[Tensor, Tensor | None]:
    if axis is None:
        own = torch.arange(run.past, run.past + run.length, device=states.device)
        return own.expand(len(states), -1), None
    return axis.index_BK + run.past, axis.filled_BK


def _spread(states_BKD: Tensor, axis: Axis, length: int) -> Tensor:
    if axis.whole:
        return states_BKD
    at = axis.spread(length).to(states_BKD.device)
    return states_BKD.gather(1, at[..., None].expand(-1, -1, states_BKD.shape[2]))


def _forward(
    model: Any, reduction: Reduction, stock: Callable[..., Any], signature: inspect.Signature, *args: Any, **kwargs: Any
) -> Any:
    """In place of the whole model's `forward`: the same, and noted what it was called with.

    A hook would miss those who call `forward` themselves, as PEFT does.
    """
    reduction.told = dict(signature.bind_partial(*args, **kwargs).arguments)
    return stock(*args, **kwargs)


def _features(trunk: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
    """In place of `get_image_features`: the same, and the pictures noted."""
    reduction.tower.take()  # what videos left there, and layers that were computed again for their gradients
    spec, stock = reduction.spec, type(trunk).get_image_features
    names = list(inspect.signature(stock).parameters)[1:]

    def near(name: str, value: Any) -> Any:
        return value.cpu() if name in spec.on_host and isinstance(value, Tensor) else value

    args = tuple(near(name, value) for name, value in zip(names, args, strict=False))
    kwargs = {name: near(name, value) for name, value in kwargs.items()}
    output = stock(trunk, *args, **kwargs)
    inputs = dict(zip(names, args, strict=False)) | kwargs
    with torch.no_grad(), exact(reduction.patch.reducer, trunk.device):
        reduction.pictures = spec.pictures(trunk, output, inputs, reduction.tower)
    if not isinstance(output, tuple):
        setattr(output, _PICTURES, reduction.pictures)  # for those who give it as `mm_encoder_outputs`, maybe later
    return output


def _videos(trunk: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
    """In place of `get_video_features`, which may ask `get_image_features`: the same, and the images' pictures kept."""
    pictures = reduction.pictures
    output = type(trunk).get_video_features(trunk, *args, **kwargs)
    reduction.pictures = pictures
    reduction.tower.take()
    return output


def _placeholders(trunk: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Any:
    """In place of `get_placeholder_mask`: the same marks, but of what it makes the host read more use is made."""
    stock = type(trunk).get_placeholder_mask
    given = inspect.signature(stock).bind(trunk, *args, **kwargs).arguments
    features = given.get("image_features")
    if reduction.run is None or features is None:
        return stock(trunk, *args, **kwargs)
    image, others = reduction.spec.marks(trunk, given.get("input_ids"), given["inputs_embeds"])
    reduction.start(image, features.numel() // features.shape[-1])
    return image[..., None] if others is None else (image[..., None], others[..., None])


def _merger(
    trunk: Any, reduction: Reduction, input_ids: Tensor | None, inputs_embeds: Tensor, image_hidden_states: Tensor
) -> Tensor:
    """In place of `inputs_merger`, which puts the features there, too."""
    image, _ = reduction.spec.marks(trunk, input_ids, inputs_embeds)
    features = image_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
    reduction.start(image, features.numel() // features.shape[-1])
    return inputs_embeds.masked_scatter(image[..., None], features)


def _deepstack(language: Any, reduction: Reduction, states: Tensor, visual_pos_masks: Tensor, planes: Tensor) -> Tensor:
    """In place of `_deepstack_process`, which adds a plane of visual features to the states of a layer."""
    run = reduction.run
    if run is None or run.plan is None:
        return type(language)._deepstack_process(language, states, visual_pos_masks, planes)
    mask = visual_pos_masks.to(states.device)[..., None]
    whole = states.new_zeros(*mask.shape[:2], states.shape[2])
    whole = whole.masked_scatter(mask, planes.to(states.device, states.dtype))
    return states + run.plan.to(states.device).reduce(whole)
