"""Images of coloured, textured, partly overlapping shapes, drawn in batches.

Image `i` of seed `s` is always the same, in any batch, order and on any device: every random number
is a splitmix64 hash of (s, i, slot), and everything that depends on the image is integer
arithmetic, except the distances used to place objects. For speed, shapes are drawn once from their
signed distances into an atlas of stamps (shape x radius x angle x texture); an image is up to ten
stamps on a canvas, later ones on top.

Shape suffixes: B images, K objects (10 unless asked for more), C candidate places, S side in
pixels, W stamp side, N patches.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.lab.scenes.backgrounds import SIDE, crops, patterns
from pumer.lab.scenes.dice import Dice

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
TEXTURES = ("solid", "stripes", "checker", "dots")
OBJECTS = (4, 10)
"""Least and most objects in an image."""

_RGB = ((225, 25, 30), (25, 165, 45), (30, 70, 240), (245, 225, 30),
        (150, 45, 205), (40, 215, 225), (250, 130, 10), (243, 243, 243))  # fmt: skip
_RADII = (8.5, 9.0, 9.5, 13.0, 13.5, 14.0)  # pixels at scale 1; the first three are small
_ANGLES = tuple(math.radians(a) for a in (-4, 0, 4))
_REACH = 1.25  # the farthest any shape extends from its centre, in radii
_CANDIDATES = 8
_COVER_LIMIT = 0.33  # estimated share of an object that later ones may cover
_MIN_VISIBLE = 0.5
_MOST_OBJECTS = 64  # their numbers are int8, and their places are found one after the other
_CHUNK = 32  # images a step on CPU, so that its arrays stay in the cache
_MIN_COVER = 0.25  # share of a patch that objects must cover for it not to be background


@dataclass(frozen=True)
class Scenes:
    """A batch of images and the objects in them.

    `images` uint8 [B, 3, S, S]. `colour`, `shape`, `size`, `texture` (indices into COLOURS, SHAPES,
    SIZES, TEXTURES), `x`, `y` (centre, pixels from the left and from the top): int64 [B, K].
    `present` bool [B, K]; the other columns mean nothing where it is False. `owner` int8 [B, S,
    S]: the object seen at a pixel, -1 background.
    """

    images: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    texture: Tensor
    x: Tensor
    y: Tensor
    present: Tensor
    owner: Tensor


def draw_scenes(
    seed: int,
    index: Sequence[int] | Tensor,
    *,
    image_size: int = SIDE,
    objects: tuple[int, int] = OBJECTS,
    shape_scale: float | None = None,
    photographs: Sequence[Tensor] = (),
    device: torch.device | str = "cpu",
) -> Scenes:
    """Draw the images `index` of `seed`.

    Every object is entirely inside the image and at least half visible: one that later objects
    would cover further is omitted (in about one image in fifty, if there are at most 10).

    Args:
        seed: of the random numbers.
        index: numbers of the images.
        image_size: side in pixels.
        objects: least and most objects in an image.
        shape_scale: size of the shapes, 1 for radii of 8 to 14 pixels; they grow with the image if
            not given.
        photographs: backgrounds in place of noise and textures, uint8 [3, H, W] each, no side
            shorter than `image_size`; crops of them are drawn on.
        device: where to draw.

    Raises ValueError when `image_size` is below 32, or objects or shapes do not fit it.

    >>> scenes = draw_scenes(7, [0, 1], image_size=64)
    >>> scenes.images.shape
    torch.Size([2, 3, 64, 64])
    """
    if image_size < 32:
        raise ValueError(
            f"image_size is {image_size}; shapes need at least 32 pixels a side to be told apart."
        )
    scale = check_style(image_size, objects, shape_scale)
    device = torch.device(device)
    index = torch.as_tensor(index, dtype=torch.int64, device=device)
    grounds = [photograph.to(device) for photograph in photographs]
    parts = [
        _draw(seed, part, image_size, objects, scale, grounds)
        for part in index.split(_CHUNK if device.type == "cpu" else 4096)
    ]
    return Scenes(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_style(image_size: int, objects: tuple[int, int], shape_scale: float | None) -> float:
    """The size of shapes; raises ValueError if such or so many do not fit an image."""
    least, most = objects
    scale = image_size / SIDE if shape_scale is None else shape_scale
    if not 1 <= least <= most <= _MOST_OBJECTS:
        raise ValueError(
            f"objects are the least and the most of an image, 1 to {_MOST_OBJECTS}, not {objects}"
        )
    across = 2 * math.ceil(_REACH * _RADII[-1] * max(scale, 0))
    if not 0 < across < image_size:
        raise ValueError(
            f"shape_scale {scale:g} makes the largest shape {across} pixels across: give one above "
            f"0 at which it fits the image's {image_size}"
        )
    return scale


def patch_targets(scenes: Scenes, patch_size: int) -> tuple[Tensor, Tensor]:
    """Colour and shape class of the object that covers most of each patch: two int64 [B, N],
    patches in raster order.

    Class 0 is background (objects cover less than a quarter of the patch), class c + 1 is
    COLOURS[c] or SHAPES[c]. Raises ValueError when `patch_size` does not divide the image.
    """
    pixels_BNK = patch_pixels(scenes, patch_size)
    foreground = pixels_BNK.sum(-1) >= _MIN_COVER * patch_size**2
    main_BN = pixels_BNK.argmax(-1)
    return (scenes.colour.gather(1, main_BN) + 1) * foreground, (
        scenes.shape.gather(1, main_BN) + 1
    ) * foreground


def patch_offsets(scenes: Scenes, patch_size: int) -> Tensor:
    """Offset from each patch's centre to that of the object covering most of it: int64 [B, N, 2].

    In pixels, across and down; 0 on background. Raises ValueError when `patch_size` does not divide
    the image.
    """
    pixels_BNK = patch_pixels(scenes, patch_size)
    main_BN = pixels_BNK.argmax(-1)
    per_side = scenes.owner.shape[1] // patch_size
    middle = torch.arange(per_side, device=main_BN.device) * patch_size + patch_size // 2
    across = scenes.x.gather(1, main_BN) - middle.repeat(per_side)
    down = scenes.y.gather(1, main_BN) - middle.repeat_interleave(per_side)
    foreground = pixels_BNK.sum(-1) >= _MIN_COVER * patch_size**2
    return torch.stack([across, down], -1) * foreground[..., None]


def patch_pixels(scenes: Scenes, patch_size: int) -> Tensor:
    """Visible pixels of each object in each patch: int64 [B, N, K], patches in raster order.

    Raises ValueError when `patch_size` does not divide the image.
    """
    batch, side = scenes.owner.shape[:2]
    if side % patch_size:
        raise ValueError(
            f"patch_size {patch_size} does not divide the image's {side} px; choose a divisor."
        )
    per_side = side // patch_size
    owner = scenes.owner.view(batch, per_side, patch_size, per_side, patch_size).transpose(2, 3)
    owner = owner.reshape(batch, per_side**2, patch_size**2).long()
    counts = owner.new_zeros(batch, per_side**2, scenes.present.shape[1] + 1)
    counts.scatter_add_(2, owner + 1, torch.ones_like(owner))
    return counts[..., 1:]


# Drawn once: stamps


def _distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance in pixels, negative inside, to a shape of radius `r`; exact enough near the
    edge."""
    if shape == "circle":
        return (x**2 + y**2).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.87 * r
    if shape == "triangle":  # equilateral, point up, circumradius 1.25 r
        return torch.maximum(x.abs() * math.sqrt(0.75) - y * 0.5, y) - 0.625 * r
    if shape == "cross":
        bars = (torch.maximum(a.abs() - 1.12 * r, b.abs() - 0.38 * r) for a, b in ((x, y), (y, x)))
        return functools.reduce(torch.minimum, bars)
    assert shape == "star"  # five points: fold the plane into half a point, then one straight edge
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    length = (x**2 + y**2).sqrt()
    px, py = length * torch.sin(angle), length * torch.cos(angle)
    tip = _REACH * r
    ex, ey = 0.56 * r * math.sin(fifth / 2), 0.56 * r * math.cos(fifth / 2) - tip
    return (px * -ey + (py - tip) * ex) / math.hypot(ex, ey)


def _shade(texture: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Whether a pixel is in the dark part of a texture whose features are a fixed share of the
    radius."""
    period = max(0.8 * r, 5.0)
    if texture == "stripes":
        return torch.remainder(y / period + 0.25, 1) < 0.5
    if texture == "checker":
        return (torch.floor(2 * x / period) + torch.floor(2 * y / period)) % 2 == 0
    if texture == "dots":
        fx, fy = (torch.remainder(v / period, 1) - 0.5 for v in (x, y))
        return fx**2 + fy**2 < 0.3**2
    return torch.zeros_like(x, dtype=torch.bool)


@functools.lru_cache(maxsize=4)
def _atlas(scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """All stamps, int16 [shape * radius * angle * texture, W * W]: brightness 0..127 inside, -1
    outside; and areas."""
    half = math.ceil(_REACH * _RADII[-1] * scale)
    grid = torch.arange(-half, half + 1, dtype=torch.float32)
    angle = torch.tensor(_ANGLES)[:, None, None]
    y, x = grid[None, :, None], grid[None, None, :]
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    stamps = []
    for shape in SHAPES:
        for radius in _RADII:
            distance = _distance(shape, u, v, radius * scale)
            by_texture = []
            for texture in TEXTURES:
                light = torch.where(_shade(texture, u, v, radius * scale), 102, 127)
                light = torch.where(
                    distance > -1, 52, light
                )  # an outline keeps overlapping equals apart
                by_texture.append(torch.where(distance < 0, light, -1))
            stamps.append(torch.stack(by_texture, 1))
    atlas = torch.stack(stamps).to(torch.int16).flatten(0, 2).flatten(1).to(device)
    return atlas, (atlas >= 0).sum(1)


# Drawn for every image


def _draw(
    seed: int,
    index_B: Tensor,
    image_size: int,
    objects: tuple[int, int],
    scale: float,
    photographs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The fields of `Scenes`, in order, for one chunk of images."""
    dice = Dice(seed, index_B)
    least, most = objects
    colour, shape, texture, radius, angle = (
        dice.roll(most) % n
        for n in (len(COLOURS), len(SHAPES), len(TEXTURES), len(_RADII), len(_ANGLES))
    )
    # Two images in five favour one colour or one shape; without them counts above three would
    # hardly occur.
    theme, favourite, adopts = dice.roll(1) % 5, dice.roll(1), dice.roll(most) % 10 < 6
    colour = torch.where(adopts & (theme == 0), favourite % len(COLOURS), colour)
    shape = torch.where(adopts & (theme == 1), favourite % len(SHAPES), shape)

    count = least + dice.roll(1) % (most - least + 1)
    present = torch.arange(most, device=index_B.device) < count
    x, y = _place(dice, radius, present, image_size, scale)

    stamp = ((shape * len(_RADII) + radius) * len(_ANGLES) + angle) * len(TEXTURES) + texture
    value = _lay(stamp, x, y, present, image_size, scale)
    owner = (value >> 7).to(torch.int8)
    num_visible = torch.stack([(owner == k).sum((1, 2)) for k in range(most)], 1)
    hidden = present & (num_visible < _MIN_VISIBLE * _atlas(scale, index_B.device)[1][stamp])
    redo = hidden.any(1).nonzero()[:, 0]  # once is enough: taking objects away only uncovers others
    if len(redo):
        present = present & ~hidden
        value[redo] = _lay(stamp[redo], x[redo], y[redo], present[redo], image_size, scale)

    images, owner = _paint(dice, colour, value, photographs)
    return images, colour, shape, (radius >= len(_RADII) // 2).long(), texture, x, y, present, owner


def _place(
    dice: Dice, radius_BK: Tensor, present_BK: Tensor, image_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Centres, int64 [B, K] each: the first of eight hashed places that leaves all earlier objects
    visible enough.

    Without such a place, the one that does least harm. The share one disc covers of another is
    taken as linear in their distance, which is too much rather than too little up to a half.
    """
    r_BK = torch.tensor(_RADII, device=radius_BK.device)[radius_BK] * scale
    margin = torch.ceil(_REACH * r_BK).long()
    span = (image_size - 2 * margin)[..., None]
    x_BKC, y_BKC = (
        margin[..., None] + dice.roll(radius_BK.shape[1], _CANDIDATES) % span for _ in range(2)
    )
    x_BK, y_BK = x_BKC[..., 0].clone(), y_BKC[..., 0].clone()
    covered_BK = torch.zeros_like(r_BK)
    order_C = torch.arange(_CANDIDATES, device=r_BK.device) / _CANDIDATES
    for k in range(1, radius_BK.shape[1]):
        dx, dy = x_BKC[:, k, :, None] - x_BK[:, None, :k], y_BKC[:, k, :, None] - y_BK[:, None, :k]
        ours, theirs = r_BK[:, k, None], r_BK[:, :k]
        smaller = torch.minimum(ours, theirs)
        share = ((ours + theirs)[:, None] - (dx * dx + dy * dy).float().sqrt()) / (2 * smaller)[
            :, None
        ]
        share = (
            share.clamp(0, 1) * ((smaller / theirs) ** 2)[:, None] * present_BK[:, k, None, None]
        )
        total_BCk = covered_BK[:, None, :k] + share
        worst_BC = total_BCk.amax(2)
        choice = torch.where(worst_BC <= _COVER_LIMIT, order_C, 1 + worst_BC).argmin(
            1, keepdim=True
        )
        x_BK[:, k], y_BK[:, k] = (c[:, k].gather(1, choice)[:, 0] for c in (x_BKC, y_BKC))
        covered_BK[:, :k] = total_BCk.gather(1, choice[..., None].expand(-1, 1, k))[:, 0]
    return x_BK, y_BK


def _lay(
    stamp_BK: Tensor,
    x_BK: Tensor,
    y_BK: Tensor,
    present_BK: Tensor,
    image_size: int,
    scale: float,
) -> Tensor:
    """Lay the stamps on a canvas: int16 [B, S, S], object * 128 + brightness, -1 for background."""
    atlas, _ = _atlas(scale, stamp_BK.device)
    window = math.isqrt(atlas.shape[1])
    half = window // 2
    side = image_size + 2 * half  # a margin, so that no stamp needs clipping
    reach = torch.arange(window, device=stamp_BK.device)
    offset = (reach[:, None] * side + reach).flatten()
    corner_BK = y_BK * side + x_BK
    canvas = torch.full((len(stamp_BK), side * side), -1, dtype=torch.int16, device=stamp_BK.device)
    for k in range(stamp_BK.shape[1]):  # the painter's order
        at = corner_BK[:, k, None] + offset
        light = atlas[stamp_BK[:, k]]
        drawn = (light >= 0) & present_BK[:, k, None]
        canvas.scatter_(1, at, torch.where(drawn, light + k * 128, canvas.gather(1, at)))
    return canvas.view(-1, side, side)[:, half:-half, half:-half].contiguous()


def _paint(
    dice: Dice, colour_BK: Tensor, value_BSS: Tensor, photographs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Colour the canvas: uint8 [B, 3, S, S] and the owner of each pixel, int8 [B, S, S]."""
    side, device = value_BSS.shape[-1], value_BSS.device
    noise, textures = patterns(side, device)
    start, which = dice.roll(4) % side, dice.roll(1)[:, 0] % len(textures)
    strength, coarseness = (
        (8 + dice.roll(1, 1) % 25).to(torch.int16),
        (2 + dice.roll(1, 1) % 6).to(torch.int16),
    )
    # Indexing a view of all windows copies whole rows; indexing pixel by pixel is several times
    # slower.
    windows = textures.unfold(1, side, 1).unfold(2, side, 1)
    texture_BSS = (windows[which, start[:, 0], start[:, 1]] * strength) >> 5
    windows = noise.unfold(0, side, 1).unfold(1, side + 2, 1)
    grain = (windows[start[:, 2], start[:, 3]] * coarseness) >> 3

    ground = (40 + dice.roll(1) % 60 + dice.roll(3) % 31 - 15).to(torch.int16)
    rgb = torch.tensor(_RGB, device=device)[colour_BK] + dice.roll(colour_BK.shape[1], 3) % 25 - 12
    rgb = rgb.clamp(0, 255).to(torch.int16)
    owner = (value_BSS >> 7).to(torch.int8)  # -1 >> 7 is -1
    flat, light = owner.clamp_min(0).flatten(1).long(), value_BSS & 127
    foreground = owner >= 0
    crops_B3SS = crops(dice, photographs, side) if photographs else None
    images = torch.empty(len(owner), 3, side, side, dtype=torch.uint8, device=device)
    for c in range(3):
        paint = (
            rgb[:, :, c].gather(1, flat).view_as(owner) * light
        ) >> 7  # at most 255 * 127: fits int16
        if crops_B3SS is None:
            behind = texture_BSS + ground[:, c, None, None]
        else:
            behind = crops_B3SS[:, c]
        pixel = torch.where(foreground, paint, behind)
        # Channels share one grain, a pixel apart: coloured noise for a third of the gathers.
        images[:, c] = pixel.add_(grain[..., c : c + side]).clamp_(0, 255)
    return images, owner
