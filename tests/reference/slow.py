"""What the methods and METER mean, by the words of their papers: in loops, without any of the
package's own code."""

import math
from itertools import pairwise

import torch


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def bipartite(keys, merged, protected=0, last=()):
    """Groups of tokens, in order, by ToMe's published rule; and the smallest gap that decided.

    Sources are at even places and destinations at odd ones. The first `protected` tokens have their
    places, but take no part. Sources among `last` merge after all others.
    """
    unit = [[x / math.sqrt(dot(key, key)) for x in key] for key in keys]
    sources = [token for token in range(protected, len(keys)) if token % 2 == 0]
    destinations = [token for token in range(protected, len(keys)) if token % 2 == 1]
    best = []
    for source in sources:
        ranked = sorted(((dot(unit[source], unit[to]), to) for to in destinations), reverse=True)
        if ranked:
            lead = smallest_gap(similarity for similarity, _ in ranked[:2])
            best.append((*ranked[0], source, lead))
    best.sort(key=lambda pair: (pair[2] not in last, *pair), reverse=True)
    merged = min(merged, (len(keys) - protected) // 2)
    group = {token: {token} for token in range(len(keys))}
    for _, destination, source, _ in best[:merged]:
        group[destination].add(source)
        del group[source]
    edge = best[max(merged - 1, 0) : merged + 1]
    cut = math.inf
    if len({source in last for *_, source, _ in edge}) == 1:  # else the order is not by similarity
        cut = smallest_gap(similarity for similarity, *_ in edge)
    gap = min([cut, *(lead for *_, lead in best[:merged])])
    return [frozenset(group[token]) for token in sorted(group)], gap


def smallest_gap(falling):
    return min((a - b for a, b in pairwise(falling)), default=math.inf)


def average(values, sizes, groups):
    """Averages of the groups, weighted by size."""
    return [
        [
            sum(sizes[token] * values[token][i] for token in group)
            / sum(sizes[token] for token in group)
            for i in range(len(values[0]))
        ]
        for group in groups
    ]


def pumer(reducer, queries, keys, text, cross=False, carried=None):
    """Groups of tokens of one sample by the words of the PuMer paper, and the smallest gap that
    decided.

    Args:
        queries, keys: of every head and token.
        text: text tokens; the others are the image.
        cross: whether the softmax of the text's attention is over the image alone.
        carried: for every token, what earlier layers carry on, where they are smoothed.

    Returns:
        the groups, the gap, and the attention that every token receives from the text.
    """
    heads, count, channels = len(keys), len(keys[0]), len(keys[0][0])
    seen = range(text if cross else 0, count)
    attention = [0.0] * count
    for head in range(heads):
        for row in range(text):
            logits = {
                token: dot(queries[head][row], keys[head][token]) / math.sqrt(channels)
                for token in seen
            }
            total = sum(math.exp(logit) for logit in logits.values())
            for token in seen:
                attention[token] += math.exp(logits[token]) / total / heads
    mean = [
        [sum(parts) / heads for parts in zip(*vectors, strict=True)]
        for vectors in zip(*keys, strict=True)
    ]

    # Prune the image tokens that the text attends to least.
    image = list(range(text + 1, count))
    if reducer.smooth:
        total = sum(attention[token] for token in image)
        for token in image:
            share = attention[token] / total
            before = carried[token] if carried else share
            attention[token] = reducer.smooth * before + (1 - reducer.smooth) * share
    pruned = round(reducer.prune * len(image))
    ranked = sorted(image, key=lambda token: -attention[token])
    kept = ranked[: len(image) - pruned]
    gaps = [smallest_gap(attention[token] for token in ranked[len(kept) - 1 : len(kept) + 1])]
    if reducer.prune_below and image:
        bar = reducer.prune_below * sum(attention[token] for token in image) / len(image)
        gaps.append(min(abs(attention[token] - bar) for token in image))
        kept = [token for token in ranked if token in kept or attention[token] >= bar]
    # What the text attends to most merges last.
    spared = kept[: round(reducer.protect * len(kept))]
    if spared and len(spared) < len(kept):
        gaps.append(smallest_gap(attention[kept[i]] for i in (len(spared) - 1, len(spared))))
    kept = sorted(kept)
    # Merge image tokens with image tokens, text tokens with text tokens.
    merged = min(round((reducer.prune + reducer.merge) * len(image)) - pruned, len(kept) // 2)
    words = list(range(1, text))
    merged_words = min(round(reducer.merge_text * len(words)), len(words) // 2)
    found = []
    for tokens, gone in ((words, merged_words), (kept, merged)):
        last = {place for place, token in enumerate(tokens) if token in spared}
        matched, gap = bipartite([mean[token] for token in tokens], gone, last=last)
        found.append([frozenset(tokens[i] for i in group) for group in matched])
        gaps.append(gap)
    groups = [frozenset({0}), *found[0], frozenset({text}), *found[1]]
    return groups, min(gaps), attention


# --- METER, from its weights ---


def attend(queries, keys, values, bias):
    """Multi-head attention [..,N,D] of queries [..,H,N,C]; `bias` [..,M] is added to the logits."""
    logits = (
        queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1]) + bias[..., None, None, :]
    )
    return (logits.softmax(-1) @ values).transpose(-2, -3).flatten(-2)


def heads(module, states, count):
    return module(states).unflatten(-1, (count, -1)).transpose(-2, -3)


def look(attention, states, other, bias):
    """States that have looked at others and were normed, with the queries and keys of it."""
    module, count = attention.self, attention.self.num_attention_heads
    queries = heads(module.query, states, count)
    keys, values = (heads(part, other, count) for part in (module.key, module.value))
    context = attend(queries, keys, values, bias)
    return attention.output.LayerNorm(states + attention.output.dense(context)), queries, keys


def feed_forward(half, states):
    inner = torch.nn.functional.gelu(half.intermediate.dense(states))
    return half.output.LayerNorm(states + half.output.dense(inner))


def fuse(meter, text, image, text_bias, image_bias, reduce=lambda *tokens: tokens[1:6]):
    """Pooled states after METER's fusion layers, by figure 3 of its paper.

    Args:
        text, image: states [..,T,D] and [..,I,D], their kinds added.
        text_bias, image_bias: what is added to the logits of attention to them, [..,T] and [..,I].
        reduce: called between the attention and the feed-forward of the text, with the number of
            the layer, the text's states there and at the start of the layer, the image's, both
            biases, the queries of the text, and the keys of text and image; gives what follows the
            number, up to the biases.
    """
    for number, layer in enumerate(meter.layers):
        attended, _, words = look(layer.text.attention, text, text, text_bias)
        attended, queries, patches = look(layer.text.crossattention, attended, image, image_bias)
        attended, text, image, text_bias, image_bias = reduce(
            number, attended, text, image, text_bias, image_bias, queries, words, patches
        )
        new_text = feed_forward(layer.text, attended)
        image, _, _ = look(layer.image.attention, image, image, image_bias)
        read = new_text if meter.config.update == "sequential" else text
        image, _, _ = look(layer.image.crossattention, image, read, text_bias)
        text, image = new_text, feed_forward(layer.image, image)
    return torch.cat(
        [pooler.dense(states).tanh() for pooler, states in _poolers(meter, text, image)], -1
    )


def _poolers(meter, text, image):
    """Each pooler with what it reads, the [CLS]; of an image without any token, zeros."""
    first = image[..., 0, :] if image.shape[-2] else torch.zeros(*image.shape[:-2], image.shape[-1])
    return (meter.text_pooler, text[..., 0, :]), (meter.image_pooler, first)


def clip(vision, pixels, reducer=None):
    """States [I,D] of one picture after CLIP's layers and its norm, and the sizes; merged in every
    layer by ToMe."""
    states, groups = clip_groups(vision, pixels, reducer)
    return vision.post_layernorm(states), torch.tensor([float(len(group)) for group in groups])


def clip_groups(vision, pixels, reducer=None, depth=None):
    """`tower_groups` of CLIP."""
    return tower_groups(vision, pixels, reducer, 1, depth)


def tower_groups(vision, pixels, reducer=None, protected=1, depth=None):
    """States [K,D] of one picture after the first `depth` layers of a vision tower, all if not
    given, and the tokens in each group.

    `protected` is the number of tokens before the patches, which are never merged.
    """
    more = {"interpolate_pos_encoding": True} if hasattr(vision, "post_layernorm") else {}
    states = vision.embeddings(pixels[None], **more)
    states = getattr(vision, "pre_layrnorm", torch.nn.Identity())(states)[0]
    members, count = [{number} for number in range(len(states))], vision.config.num_attention_heads
    for number, layer in enumerate(_layers(vision)[:depth]):
        sizes = torch.tensor([float(len(group)) for group in members])
        first, module, second = _parts(layer)
        normed = first(states)
        queries, keys, values = (
            heads(part, normed, count) for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        counted = reducer is not None and reducer.proportional
        context = attend(queries, keys, values, sizes.log() if counted else 0 * sizes)
        out = module.out_proj if hasattr(module, "out_proj") else module.o_proj
        states = states + getattr(layer, "layer_scale1", torch.nn.Identity())(out(context))
        if reducer is not None:
            groups, gap = bipartite(keys.mean(0).tolist(), reducer.schedule[number], protected)
            assert gap > 1e-6, "a tie decides: take other weights"
            states, _ = gather(states, sizes, groups)
            members = [set().union(*(members[i] for i in group)) for group in groups]
        fresh = layer.mlp(second(states))
        states = states + getattr(layer, "layer_scale2", torch.nn.Identity())(fresh)
    return states, members


def square_groups(vision, pixels, reducer, side):
    """States [N,D] of all patches of one picture after the layers of SmolVLM's vision tower, where
    whole squares of patches are merged, and the squares in each group."""
    rows = columns = pixels.shape[1] // vision.config.patch_size
    every = torch.ones(1, rows, columns, dtype=torch.bool)
    states = vision.embeddings(pixels[None], every)[0]
    number = torch.arange(rows * columns).view(rows, columns)
    squares = [
        number[row : row + side, column : column + side].flatten()
        for row in range(0, rows, side)
        for column in range(0, columns, side)
    ]
    units = [states[square] for square in squares]
    members, heads_count = [{at} for at in range(len(units))], vision.config.num_attention_heads
    for at, layer in enumerate(vision.encoder.layers):
        sizes = [float(len(group)) for group in members]
        flat, module = layer.layer_norm1(torch.cat(units)), layer.self_attn
        queries, keys, values = (
            heads(part, flat, heads_count) for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        bias = torch.tensor(sizes).log().repeat_interleave(side**2)
        fresh = module.out_proj(attend(queries, keys, values, bias))
        units = list((torch.cat(units) + fresh).split(side**2))
        means = [key.mean(0).tolist() for key in keys.mean(0).split(side**2)]
        groups, gap = bipartite(means, reducer.schedule[at])
        assert gap > 1e-6, "a tie decides: take other weights"
        units = [
            sum(sizes[unit] * units[unit] for unit in group) / sum(sizes[unit] for unit in group)
            for group in groups
        ]
        members = [set().union(*(members[unit] for unit in group)) for group in groups]
        flat = torch.cat(units)
        units = list((flat + layer.mlp(layer.layer_norm2(flat))).split(side**2))
    for unit, group in zip(units, members, strict=True):
        for square in group:
            states[squares[square]] = unit
    return states, members


def _layers(vision):
    encoder = getattr(vision, "encoder", vision)
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def _parts(layer):
    """The first norm, the attention and the second norm of a layer."""
    if hasattr(layer, "self_attn"):
        return layer.layer_norm1, layer.self_attn, layer.layer_norm2
    if hasattr(layer, "layernorm_before"):
        return layer.layernorm_before, layer.attention, layer.layernorm_after
    return layer.norm1, layer.attention, layer.norm2


def gather(states, sizes, groups):
    """Averages [K,D] of groups of tokens by their sizes [N], and the sizes of the groups."""
    averages = average(states.tolist(), sizes.tolist(), groups)
    return torch.tensor(averages), torch.stack([sizes[list(group)].sum() for group in groups])


def meter(model, one, tower=None, inside=None):
    """Pooled states of one sample without padding, reduced by ToMe in the tower and PuMer in the
    fusion layers.

    Returns them, and how many source tokens every image token stood for in the end.
    """
    trunk, kinds = model.base_model, model.base_model.modality_embeddings.weight
    text = trunk.text_projection(
        trunk.text_model(one["input_ids"], one["attention_mask"]).last_hidden_state
    )[0]
    picture, image_sizes = clip(trunk.vision_model, one["pixel_values"][0], tower)
    image = trunk.image_projection(picture)
    counted = tower is not None and tower.proportional
    sizes = [torch.ones(len(text)), image_sizes]

    def biases():
        return [each.log() if counted else 0 * each for each in sizes]

    def reduce(number, attended, before, image, text_bias, image_bias, queries, words, patches):
        if inside is None or number not in inside.layers:
            return attended, before, image, text_bias, image_bias
        count, keys = len(attended), torch.cat([words, patches], 1)
        groups, gap, _ = pumer(inside, queries.tolist(), keys.tolist(), count, cross=True)
        assert gap > 1e-6, "a tie decides: take other weights"
        of_text = [group for group in groups if min(group) < count]
        of_image = [{i - count for i in group} for group in groups if min(group) >= count]
        before, _ = gather(before, sizes[0], of_text)
        attended, sizes[0] = gather(attended, sizes[0], of_text)
        image, sizes[1] = gather(image, sizes[1], of_image)
        return attended, before, image, *biases()

    return fuse(trunk, text + kinds[0], image + kinds[1], *biases(), reduce), sizes[1]
