"""What the methods that reduce image tokens mean, in loops over one picture, by the words of their
papers."""

import math

import numpy as np


def top(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda token: -scores[token])[:count])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosine(x):
    return unit(x) @ unit(x).T


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def fastervlm(picture, count):
    return top(picture.attention, count)


def fopru(picture, count):
    return top(picture.received, count)


def fopru_variance(picture, count):
    return top(max(picture.received, picture.given, key=np.var), count)


def rows_of(picture):
    """The rows of the picture as lists of tokens, from the one received most attention on
    average."""
    rows, columns = picture.grid
    tokens = [list(range(row * columns, (row + 1) * columns)) for row in range(rows)]
    return sorted(tokens, key=lambda row: -np.mean([picture.received[token] for token in row]))


def fopru_row(picture, count):
    """Whole rows, and of the first that does not fit the best."""
    kept = []
    for row in rows_of(picture):
        kept += sorted(row, key=lambda token: -picture.received[token])[: count - len(kept)]
    return sorted(kept)


def fopru_whole_rows(picture, share):
    rows = rows_of(picture)
    return sorted(token for row in rows[: max(1, round(share * len(rows)))] for token in row)


def leverage(features, energy):
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    count = 1
    while sum(s[:count] ** 2) < energy * sum(s**2) * (1 - 1e-9):
        count += 1
    return [round(sum(u[token, :count] ** 2), 5) / count for token in range(len(features))]


def svd_prune(picture, count, energy=0.9):
    return top(leverage(picture.features, energy), count)


def svd_prune_mass(picture, count, mass, energy=0.9):
    scores = leverage(picture.features, energy)
    falling = sorted(scores, reverse=True)
    enough = next(n for n in range(1, len(falling) + 1) if sum(falling[:n]) >= mass)
    return top(scores, min(count, enough))


def energy_count(features, tau):
    s = np.linalg.svd(features, compute_uv=False) ** 2
    return next(count for count in range(1, len(s) + 1) if sum(s[:count]) >= tau * sum(s))


def divprune(picture, count):
    distance = 1 - cosine(picture.states)
    tokens = range(picture.count)
    nearest = {t: min((distance[t, u] for u in tokens if u != t), default=math.inf) for t in tokens}
    kept = [max(tokens, key=nearest.get)]
    while len(kept) < count:
        rest = [t for t in tokens if t not in kept]
        kept.append(max(rest, key=lambda t: min(distance[t, u] for u in kept)))
    return sorted(kept)


def relevance(picture, inverted=False, theta=None):
    scores = (unit(picture.states) @ unit(picture.words).T).mean(1) * (-1 if inverted else 1)
    scores = (scores - scores.min() + 1e-6) / (scores.max() - scores.min())
    return scores if theta is None else np.exp(theta / (2 * (1 - theta)) * scores)


def cdpruner(picture, count, inverted=False, theta=None):
    """The greedy set of largest determinant, by determinants."""
    scores = relevance(picture, inverted, theta)
    kernel = scores[:, None] * cosine(picture.states) * scores
    kept = []
    while len(kept) < count:
        rest = [t for t in range(picture.count) if t not in kept]
        kept.append(
            max(rest, key=lambda t: np.linalg.slogdet(kernel[np.ix_([*kept, t], [*kept, t])])[1])
        )
    return sorted(kept)


def shares(words, tokens, temperature):
    """What every token covers of every word, of all words one."""
    rows = [softmax(unit(word) @ unit(tokens).T / temperature) for word in words]
    return np.array(rows).reshape(-1, len(tokens)) / max(len(rows), 1)


def mmtok(picture, count, alpha=0.5, of_text=0.02, of_image=0.2):
    words = [picture.words[word] for word in words_after_image(picture)]
    covers = np.concatenate(
        [
            shares(words, picture.states, of_text),
            alpha * shares(picture.features, picture.features, of_image),
        ]
    )
    kept, best = [], np.zeros(len(covers))
    while len(kept) < count:
        free = [t for t in range(picture.count) if t not in kept]
        kept.append(max(free, key=lambda t: round(np.maximum(covers[:, t] - best, 0).sum(), 13)))
        best = np.maximum(best, covers[:, kept[-1]])
    return sorted(kept)


def hiprune(picture, count, alpha=0.1, penalty=None):
    """Anchors and their neighbours, who may be in another row or stand for those beyond the
    image."""
    columns = picture.grid[1]
    anchors = top(picture.middle_received, round(count * alpha / 5))
    steps = (0, -1, 1, -columns, columns)
    around = {min(max(t + step, 0), picture.count - 1) for t in anchors for step in steps}
    falling = sorted(range(picture.count), key=lambda t: -picture.received[t])
    # Where the budget has no place for all of them, anchors come first.
    around = sorted(sorted(around, key=falling.index), key=lambda t: t not in anchors)[:count]
    number = count - len(around)
    if penalty is None:
        return sorted(around + [t for t in falling if t not in around][:number])
    mean = picture.received.mean()
    lowered = [
        received - (penalty * mean if t in around else 0)
        for t, received in enumerate(picture.received)
    ]
    return sorted({*around, *top(lowered, number)})


def v2drop(picture, count):
    return top(np.linalg.norm(picture.states - picture.before, axis=1), count)


def scope(picture, count, alpha=1.0, combine="multiply"):
    """Coverage of the encoder's output, weighed by attention or with it added."""
    similarity = cosine(picture.features)
    kept, covered = [], np.zeros(picture.count)
    while len(kept) < count:
        free = [t for t in range(picture.count) if t not in kept]
        gain = {t: round(np.maximum(similarity[t] - covered, 0).sum(), 9) for t in free}
        if combine == "add":
            value = {t: gain[t] + alpha * picture.attention[t] for t in free}
        else:
            value = {t: gain[t] * picture.attention[t] ** alpha for t in free}
        kept.append(max(free, key=value.get))
        covered = np.maximum(covered, similarity[kept[-1]])
    return sorted(kept)


def vispruner(picture, count, important=0.5):
    """The next list begins with the even places that stay, from the most to the least similar."""
    similarity = cosine(picture.features)
    order = sorted(range(picture.count), key=lambda t: -picture.attention[t])
    first = int(count * important)
    kept, rest, wanted = order[:first], order[first:], count - first
    while len(rest) > wanted and wanted > 0:
        gone = min(8, len(rest) - wanted, len(rest) // 2)
        even, odd = rest[::2], rest[1::2]
        even.sort(key=lambda t: -max(similarity[t, u] for u in odd))
        rest = even[gone:] + odd
    return sorted(kept + (rest if wanted else []))


def in_chunks(count, chunks):
    """Tokens in as many stretches; the first ones are longer where they cannot all be equal."""
    sizes = [count // chunks + (number < count % chunks) for number in range(chunks)]
    tokens = iter(range(count))
    return [[next(tokens) for _ in range(size)] for size in sizes]


def variety(states):
    """Variance of a token's similarities to the others of its chunk, from 0 to 1 in the chunk."""
    similarity = cosine(states)
    np.fill_diagonal(similarity, 0)
    others = max(len(states) - 1, 1)
    mean = similarity.sum(1, keepdims=True) / others
    variance = ((similarity - mean) ** 2).sum(1) / others
    return (variance - variance.min()) / max(variance.max() - variance.min(), 1e-9)


def holov(picture, count, chunks):
    if chunks == "auto":
        chunks = max(1, int(1024 * picture.count / 576 / count))
    parts = [part for part in in_chunks(picture.count, chunks) if part]
    attention = 1000 * picture.attention
    means = [np.mean(attention[part] + 0.09 * variety(picture.states[part])) for part in parts]
    quota = [math.floor(count * mean / sum(means)) for mean in means]
    for part in sorted(range(len(parts)), key=lambda p: -means[p])[: count - sum(quota)]:
        quota[part] += 1
    by_attention = sorted(range(picture.count), key=lambda t: -attention[t])
    kept = [
        token
        for part, share in zip(parts, quota, strict=True)
        for token in [t for t in by_attention if t in part][:share]
    ]
    return sorted(kept + [t for t in by_attention if t not in kept][: count - len(kept)])


def words_after_image(picture):
    """The words behind the last image token; all where none is, or where order does not matter."""
    words = range(len(picture.words))
    if picture.places is None:
        return list(words)
    last = max(picture.places[len(words) :], default=-1)
    return [word for word in words if picture.places[word] > last] or list(words)


def dart(picture, count, pivots):
    words = len(picture.words)
    size = np.abs(picture.keys).sum((0, 2))
    text = sorted(words_after_image(picture), key=lambda t: -size[t])[: pivots[1]]
    wanted = max(pivots[0], 0 if text else 1)
    image = sorted(range(picture.count), key=lambda t: -size[words + t])[: min(wanted, count)]
    states = [picture.states[t] for t in image] + [picture.words[t] for t in text]
    remaining = count - len(image)
    each, more = divmod(remaining, len(states))
    quotas = [each + (pivot < more) for pivot in range(len(states))]
    return sorted(dart_choices(picture, image, states, quotas))


def dart_choices(picture, image, states, quotas):
    """The image pivots, then of every pivot the least similar tokens that are not taken yet."""
    kept = list(image)
    for state, quota in zip(states, quotas, strict=True):
        free = [t for t in range(picture.count) if t not in kept]
        kept += sorted(free, key=lambda t: unit(picture.states[t]) @ unit(state))[:quota]
    return kept


def text_attention(picture, rows):
    """Attention to the image of some tokens, mean over heads and tokens."""
    words, channels = len(picture.words), picture.queries.shape[2]
    logits = picture.queries[:, rows] @ picture.keys.transpose(0, 2, 1) / math.sqrt(channels)
    if picture.places is not None:
        logits[:, picture.places[rows][:, None] < picture.places] = -np.inf
    return softmax(logits)[:, :, words:].sum((0, 1)) / max(len(rows), 1) / len(logits)


def last_token(picture):
    """The token that has seen all others; without order the last word, or image token."""
    if picture.places is not None:
        return int(np.argmax(picture.places))
    return len(picture.words) - 1 if len(picture.words) else picture.count - 1


def pyramiddrop(picture, count):
    return top(text_attention(picture, [last_token(picture)]), count)


def raters(picture):
    words = words_after_image(picture)
    if not words:
        return []
    if picture.embeddings is None:
        image, text = unit(picture.states), math.sqrt(picture.states.shape[1]) * unit(picture.words)
    else:
        text, image = np.split(picture.embeddings, [len(picture.words)])
    likeness = softmax(image @ text[words].T).mean(0)
    above = [word for word, like in zip(words, likeness, strict=True) if like > likeness.mean()]
    return above or words


def density_peaks(x, clusters):
    """Centre of every one of these tokens; of two equally dense ones the earlier is the denser."""
    distance = np.linalg.norm(x[:, None] - x, axis=-1) / math.sqrt(x.shape[1])
    tokens = range(len(x))
    density = [math.exp(-np.mean(np.sort(distance[t])[:clusters] ** 2)) for t in tokens]
    peak = {}
    for t in tokens:
        denser = [distance[t, u] for u in tokens if (density[u], -u) > (density[t], -t)]
        peak[t] = density[t] * (min(denser) if denser else distance.max())
    centres = sorted(tokens, key=lambda t: -peak[t])[:clusters]
    return [t if t in centres else min(centres, key=lambda c: distance[t, c]) for t in tokens]


def sparsevlm(picture, count, merge="mean"):
    """Groups of tokens with their shares, in order of the token that each group stands for."""
    score = text_attention(picture, raters(picture))
    if not score.any():  # nobody who rates has seen the image
        score = text_attention(picture, [last_token(picture)])
    kept = top(score, count)
    groups = {t: {t: 1.0} for t in kept}
    dropped = [t for t in range(picture.count) if t not in kept]
    if dropped:
        number = min(len(dropped), int(len(dropped) * 0.3) + 1)
        recycled = sorted(sorted(dropped, key=lambda t: -score[t])[:number])
        centres = density_peaks(picture.states[recycled], min(number, number // 10 + 1))
        for token, centre in zip(recycled, centres, strict=True):
            share = score[token] if merge == "rating" else 1.0
            groups.setdefault(recycled[centre], {})[token] = share
    if merge != "sum":
        groups = {
            c: {t: w / sum(group.values()) for t, w in group.items()} for c, group in groups.items()
        }
    return [groups[leader] for leader in sorted(groups)]


def visionzip(picture, count, contextual):
    extra = min(contextual, count) if isinstance(contextual, int) else round(contextual * count)
    dominant = top(picture.attention, count - extra)
    others = [t for t in range(picture.count) if t not in dominant]
    similarity = cosine(picture.tower_keys)
    targets = others[:: max(1, len(others) // extra)][:extra] if extra else []
    joined = {t: [] for t in targets}
    for token in others:
        if token not in targets and targets:
            joined[max(targets, key=lambda t: similarity[token, t])].append(token)
    groups = {t: {t: 1.0} for t in dominant}
    groups |= {t: {t: 1.0, **{u: 1 / len(same) for u in same}} for t, same in joined.items()}
    return [groups[leader] for leader in sorted(groups)]


def prumerge_shares(picture, kept, extra=True, neighbours=32):
    """Rows of shares: of the kept tokens, each with its neighbours, and of the extra token."""
    similarity = cosine(picture.last_keys)
    tokens = range(picture.count)
    rows = []
    for token in sorted(kept):
        others = sorted((t for t in tokens if t != token), key=lambda t: -similarity[token, t])
        row = np.zeros(picture.count)
        row[others[:neighbours]] = picture.last_attention[others[:neighbours]]
        row[token] = 1
        rows.append(row)
    if extra and len(kept) < picture.count:
        rows.append([0 if t in kept else picture.last_attention[t] for t in tokens])
    return np.array(rows)


def prumerge(picture, plus, neighbours=32):
    attention = picture.last_attention
    first, third = np.percentile(attention, 25), np.percentile(attention, 75)
    outliers = [t for t, a in enumerate(attention) if a > third + 1.5 * (third - first)]
    kept = set(outliers or top(attention, 1))
    if plus:
        kept |= set(range(0, picture.count - 1, max(1, picture.count // len(kept) // 3)))
    return prumerge_shares(picture, kept, neighbours=neighbours)


def prumerge_fixed(picture, count):
    """`count` tokens with the extra one: a quarter of the others by attention, evenly spaced
    ones."""
    extra = 1 < count < picture.count
    count -= extra
    kept = set(top(picture.last_attention, max(1, count // 4)))
    free = [t for t in range(picture.count) if t not in kept]
    more = count - len(kept)
    kept |= {
        token
        for place, token in enumerate(free)
        if (place + 1) * more // len(free) > place * more // len(free)
    }
    return prumerge_shares(picture, kept, extra)


def dymu(picture, threshold, cap=math.inf):
    keys = picture.keys[:, len(picture.words) :].mean(0)
    similarity = cosine(keys)
    groups = {t: [t] for t in range(picture.count)}
    pairs = []
    for even in range(0, picture.count, 2):
        odd = max(range(1, picture.count, 2), key=lambda t: similarity[even, t], default=None)
        if odd is not None and similarity[even, odd] > threshold:
            pairs.append((even, odd))
    pairs.sort(key=lambda pair: -similarity[pair])
    for even, odd in pairs[: min(cap, len(pairs))]:
        groups[odd].append(even)
        del groups[even]
    for group in groups.values():
        group.sort()
    sizes = {leader: sum(picture.sizes[t] for t in group) for leader, group in groups.items()}
    return [
        {t: picture.sizes[t] / sizes[leader] for t in groups[leader]} for leader in sorted(groups)
    ]
