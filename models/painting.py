"""Painting and drawing: oil, watercolour, pencil, ink, comic, abstract, relief.

Each takes float32 n x 3 x h x w in 0..1 and a `Scene`, and works on a reduced copy of large pictures. Brushes are
shares of the longer side; each pass of the scene goes over the strokes once more, which makes them broader and calmer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.fields import Grid
from models.filters import (
    along,
    dog_response,
    edge_flow,
    gradient,
    kuwahara,
    lines,
    quantise,
    reduced,
    repeat,
    saturate,
    wide_blur,
)
from models.moods import corners, palette
from models.scene import Scene, colour, mix, strips
from models.tensors import blur, luminance


def strokes(image: Tensor, scene: Scene, share: float) -> Tensor:
    """Kuwahara strokes of a share of the longer side, as often as each item's passes."""
    radius = max(1, round(share * max(image.shape[2:])))
    return repeat(image, scene.passes, lambda x: kuwahara(x, radius))


def relief(height: Tensor) -> Tensor:
    """Light from the upper left on a height field: 0 in the mean."""
    down, across = gradient(height)
    return -(down + across)


def within(grid: Grid, image: Tensor) -> Grid:
    """The same seeds over a whole picture of the image's size."""
    return Grid(image.shape[2], image.shape[3], 0, image.shape[2], grid.seeds, grid.device)


def oil(image: Tensor, scene: Scene) -> Tensor:
    """Oil painting: Kuwahara strokes, and bristle marks of noise combed along the edges, lit from the side (Hertzmann
    2002, "Fast paint texture")."""

    def paint(x: Tensor) -> Tensor:
        base = strokes(x, scene, 1 / 170)
        grey = luminance(base)
        flow = edge_flow(blur(grey, 1.0), max(1.0, max(x.shape[2:]) / 100))
        bristles = along(within(scene.grid, x).grain(60, max(x.shape[2:]) / 400), flow, 7, 1.4)
        return saturate(base, 1.25) + relief(bristles * 0.5 + grey * 0.6) * 0.16

    return mix(image, reduced(image, paint), scene.amount(0.95))


def watercolour(image: Tensor, scene: Scene) -> Tensor:
    """Watercolour after Bousseau et al. 2006: abstraction, pigment density by turbulence, paper and edge darkening."""

    def paint(x: Tensor) -> Tensor:
        grid = within(scene.grid, x)
        base = strokes(x, scene, 1 / 200)
        base = saturate(base, 1.2) * 0.86 + 0.15
        down, across = gradient(luminance(base))
        rim = wide_blur((down * down + across * across).sqrt(), max(0.6, max(x.shape[2:]) / 600)) * 3.5
        pigment = 1 + (grid.clouds(61, 5) - 0.5) * 1.1 + (grid.clouds(62, 120, 2) - 0.5) * 0.3 + rim.clamp(0, 0.9)
        base = base.clamp(0, 1)
        washed = base * (1 - (1 - base) * (pigment - 1))
        y, x_ = grid.down, grid.across
        border = torch.minimum(torch.minimum(y, 1 - y), torch.minimum(x_, 1 - x_)) * 26 - 1.4 * grid.clouds(63, 14, 3)
        return mix(colour("fbf8f0", x), washed, border.clamp(0, 1))

    return mix(image, reduced(image, paint), scene.amount(0.96))


def sketch(image: Tensor, scene: Scene) -> Tensor:
    """Pencil drawing: dodged blur for the outline, hatching combed one way for the tone (Lu et al. 2012)."""

    def draw(x: Tensor) -> Tensor:
        grey = luminance(x)
        size = max(x.shape[2:])
        negative = repeat(1 - grey, scene.passes, lambda y: wide_blur(y, max(1.0, size / 220)))
        dodge = (grey / (1 - negative + 0.02)).clamp(0, 1)
        grid = within(scene.grid, x)
        slant = torch.tensor([0.8, -0.6], device=x.device).view(1, 2, 1, 1).expand(len(x), 2, *x.shape[2:])
        hatch = along(grid.grain(64, 1.2), slant, 9, 1.5)
        tone = 1 - (1 - wide_blur(grey, max(0.6, size / 300))) * (0.42 + hatch * 0.5)
        paper = 1 - grid.clouds(65, size / 2, 1) * 0.05
        page = dodge * dodge * tone.clamp(0, 1) * paper
        return page.expand(-1, 3, -1, -1) * colour("fdfbf6", x)

    return mix(image, reduced(image, draw), scene.amount(0.98))


def ink(image: Tensor, scene: Scene) -> Tensor:
    """Ink wash: few tones of ink that bleed into warm paper, and brush lines where edges run."""

    def wash(x: Tensor) -> Tensor:
        size, grid = max(x.shape[2:]), within(scene.grid, x)
        grey = luminance(strokes(x, scene, 1 / 170))
        bled = mix(grey, wide_blur(grey, size / 60), 0.35)
        bled = bled + (grid.clouds(66, 9, 4) - 0.5) * 0.22
        steps = quantise((bled * 1.3 - 0.06).clamp(0, 0.999), 5, 4.0)
        washes = 0.1 + 0.9 * steps
        brush = lines(dog_response(luminance(blur(x, 0.8)), edge_flow(grey, 2.5), max(0.8, size / 520)), 2.2)
        page = washes * (0.12 + 0.88 * brush)
        fade = (corners(_whole(scene, x)) * 1.5).clamp(0, 1)
        return palette(mix(page, torch.ones_like(page), fade * 0.8).clamp(0, 1), ("14161c", "8d8f8c", "f7f1e1"))

    return mix(image, reduced(image, wash), scene.amount(0.98))


def comic(image: Tensor, scene: Scene) -> Tensor:
    """Comic: flow-based XDoG lines over even, quantised, saturated colour (Winnemoeller et al. 2006 and 2012)."""
    return mix(image, drawn(image, scene, scene.each([1.0] * len(image))), scene.amount(0.97))


def drawn(image: Tensor, scene: Scene, gains: Tensor) -> Tensor:
    """The comic picture itself; `gains` (n x 1 x 1 x 1) weigh the lines, which are cut at full size and stay crisp."""

    def flats(x: Tensor) -> Tensor:
        base = strokes(x, scene, 1 / 170)
        grey = luminance(base)
        response = dog_response(luminance(blur(x, 0.6)), edge_flow(luminance(x), 2.5), max(0.7, max(x.shape[2:]) / 620))
        return torch.cat([base, grey, response], 1)

    plan = reduced(image, flats)
    for top, bottom in strips(*image.shape[2:], len(image)):
        base, grey, response = plan[:, :, top:bottom].split((3, 1, 1), 1)
        stepped = quantise(grey.clamp(0, 0.999), 7, 5.0)
        coloured = saturate(base + (stepped - grey), 1.5) * 1.04 + 0.02
        base.copy_(coloured.clamp(0, 1) * lines(response, gains * 2.0))
    return plan[:, :3]


def abstract(image: Tensor, scene: Scene) -> Tensor:
    """Abstract painting: the picture folded by slow noise, in broad strokes and few loud colours."""

    def paint(x: Tensor) -> Tensor:
        grid, (h, w) = within(scene.grid, x), x.shape[2:]
        y = torch.arange(h, device=x.device).view(1, 1, h, 1) + (grid.clouds(67, 6, 2) - 0.5) * (0.13 * max(h, w))
        across = torch.arange(w, device=x.device).view(1, 1, 1, w) + (grid.clouds(68, 6, 2) - 0.5) * (0.13 * max(h, w))
        index = y.round().long().clamp(0, h - 1) * w + across.round().long().clamp(0, w - 1)
        folded = x.flatten(2).gather(2, index.flatten(2).expand(-1, 3, -1)).view_as(x)
        base = strokes(folded, scene, 1 / 40)
        loud = quantise(saturate(base, 2.4).clamp(0, 0.999), 4, 6.0)
        tone = palette(luminance(base), ("1b1464", "c2185b", "ff8f1f", "ffe14d", "f2fbff"))
        grey = luminance(loud)
        bristles = along(grid.grain(69, max(h, w) / 300), edge_flow(blur(grey, 1.5), 4.0), 8, 1.5)
        return mix(loud, tone, 0.35) + relief(bristles * 0.6 + grey) * 0.12

    return mix(image, reduced(image, paint), scene.amount(0.97))


def emboss(image: Tensor, scene: Scene) -> Tensor:
    """Relief in grey: light from the upper left over the luminance."""
    grey = wide_blur(luminance(image), max(0.5, scene.pixels(1 / 700)))
    carved = 0.5 + relief(grey) * max(1.0, scene.pixels(1 / 300)) * 1.6
    return mix(image, mix(carved.expand_as(image), image, 0.12), scene.amount(0.96))


def _whole(scene: Scene, image: Tensor) -> Scene:
    return Scene(within(scene.grid, image), scene.strengths, scene.passes, scene.params)
