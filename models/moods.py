"""Moods: what a scene word (sunset, winter, cyberpunk) does to colour, light and air. A mood is a row of a table.

Colour follows the split-toning of film: a palette runs from shadow to light and replaces part of the picture's own
colour (a one-dimensional colour transfer, compare Reinhard et al. 2001). Air follows Koschmieder's law with height in
the picture in place of depth. Night is Thompson, Shirley and Ferwerda 2002: darker, bluer, less colour. Snow, stars,
bubbles and leaves are particles of `models.fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.filters import saturate
from models.scene import Scene, colour, mix, screen
from models.tensors import luminance


@dataclass(frozen=True, slots=True)
class Mood:
    """palette: colours of shadow, middle and light; grade: how much of it (0-1). saturation, exposure, contrast act on
    the picture before. lamps: coloured lights (colour, x, y, radius, power), positions 0-1, radius of the longer side.
    air: colour and density of haze (densest at the top) . clouds: colour, cells, density of drifting smoke or nebula.
    particles: shape, colour, cells, rarity, power. vignette: darkening of the corners."""

    palette: tuple[str, str, str]
    grade: float
    saturation: float = 1.0
    exposure: float = 1.0
    contrast: float = 1.0
    lamps: tuple[tuple[str, float, float, float, float], ...] = ()
    air: tuple[str, float] | None = None
    clouds: tuple[str, float, float] | None = None
    particles: tuple[str, str, float, float, float] | None = None
    vignette: float = 0.0


MOODS: Mapping[str, Mood] = {
    "sunset": Mood(("2b1038", "d4552f", "ffd58a"), 0.55, 1.15, 0.95, 1.1, vignette=0.25,
                   lamps=(("ff8a3c", 0.5, 0.3, 0.75, 0.5), ("ff5f8f", 0.1, 0.0, 0.8, 0.3))),
    "night": Mood(("04081a", "1f3566", "a9c2f0"), 0.6, 0.45, 0.5, 1.1, vignette=0.4,
                  lamps=(("8fb0ff", 0.8, 0.08, 0.4, 0.22),), particles=("stars", "dfe8ff", 26, 0.72, 0.8)),
    "winter": Mood(("1d3350", "8fb2d3", "fafdff"), 0.6, 0.4, 1.12, 0.95, air=("e9f3ff", 0.35),
                   particles=("discs", "ffffff", 22, 0.25, 0.95)),
    "spring": Mood(("1f4d2e", "86c26a", "fff0f5"), 0.3, 1.25, 1.12, 1.0, air=("ffeaf4", 0.12),
                   lamps=(("fff2b0", 0.15, 0.0, 0.8, 0.25),), particles=("leaves", "ff9fc4", 15, 0.6, 0.9)),
    "autumn": Mood(("331408", "b5561d", "ffdf9a"), 0.55, 1.1, 0.98, 1.05, vignette=0.25,
                   lamps=(("ffb347", 0.85, 0.1, 0.8, 0.25),), particles=("leaves", "d9541e", 13, 0.55, 0.95)),
    "underwater": Mood(("021c33", "127a94", "b8f5ea"), 0.68, 0.55, 0.85, 0.9, air=("2aa3b8", 0.25), vignette=0.35,
                       lamps=(("aefff2", 0.45, -0.1, 0.7, 0.45),), clouds=("8ff5e6", 14, 0.22),
                       particles=("rings", "e8fffb", 13, 0.68, 0.75)),
    "space": Mood(("05020f", "3a2270", "e5d4ff"), 0.62, 0.7, 0.68, 1.2, vignette=0.35, clouds=("b53cd6", 4, 0.55),
                  lamps=(("2f6bff", 0.2, 0.7, 0.6, 0.35), ("ff4fa3", 0.85, 0.2, 0.5, 0.3)),
                  particles=("stars", "ffffff", 30, 0.45, 1.0)),
    "cyberpunk": Mood(("0b0326", "7a1fa0", "5ff2ff"), 0.6, 1.35, 0.82, 1.3, vignette=0.35,
                      lamps=(("ff1fb0", 0.0, 0.4, 0.7, 0.6), ("00e5ff", 1.0, 0.6, 0.7, 0.5))),
    "fantasy": Mood(("12204a", "5a86b0", "e2ffe0"), 0.45, 1.25, 0.95, 1.0, air=("a8c8ff", 0.15),
                    lamps=(("3dffa0", 0.25, 0.95, 0.75, 0.5), ("ff7df0", 0.8, 0.05, 0.75, 0.5)),
                    particles=("stars", "fff3b8", 16, 0.6, 0.95)),
    "steampunk": Mood(("1a0f07", "8c5a2b", "f2cf8f"), 0.8, 0.4, 0.92, 1.25, vignette=0.45, clouds=("d9b98a", 5, 0.16),
                      lamps=(("ffb04d", 0.7, 0.2, 0.5, 0.25),)),
    "medieval": Mood(("0c141c", "57636b", "d8d3bd"), 0.6, 0.5, 0.78, 1.2, air=("7d8a92", 0.25), vignette=0.5,
                     lamps=(("ff8a2b", 0.05, 0.7, 0.55, 0.6), ("ff8a2b", 1.0, 0.45, 0.35, 0.45))),
    "wasteland": Mood(("2a1d12", "a8825a", "ecd2a0"), 0.7, 0.3, 0.95, 1.15, air=("d8b078", 0.45), vignette=0.35,
                      clouds=("c79a62", 4, 0.3)),
    "tropical": Mood(("04485a", "35c2b6", "fff6d0"), 0.36, 1.5, 1.12, 1.08,
                     lamps=(("ffe98a", 0.85, 0.0, 0.7, 0.45), ("12d5e8", 0.2, 1.0, 0.9, 0.45))),
    "zen": Mood(("22302a", "8a9c82", "f6f2e4"), 0.55, 0.5, 1.08, 0.85, air=("f1efe2", 0.35)),
    "retro80s": Mood(("2a0a5e", "e0399a", "ffd66b"), 0.42, 1.45, 1.05, 1.2,
                     lamps=(("ff3fa4", 0.5, 0.0, 0.8, 0.35), ("2fd6ff", 0.5, 1.0, 0.8, 0.35))),
    "cinematic": Mood(("03242c", "7a6a5c", "ffdcae"), 0.45, 0.95, 0.95, 1.2, vignette=0.3),
    "forest": Mood(("0a2412", "4d7a3a", "eaf5c8"), 0.45, 0.95, 0.95, 1.0, air=("cfe3b8", 0.15), vignette=0.2),
    "fog": Mood(("59636b", "a9b2b7", "eef1f2"), 0.5, 0.5, 1.05, 0.75, air=("dde3e6", 0.75), clouds=("eef1f2", 4, 0.4)),
    "rain": Mood(("141d26", "5f7482", "ccd8de"), 0.55, 0.5, 0.8, 1.0, air=("8b9aa5", 0.35), vignette=0.25,
                 particles=("streaks", "dfe9f2", 40, 0.35, 0.5)),
    "pastel": Mood(("8f86b8", "f2b8c6", "fdf6e3"), 0.45, 0.85, 1.2, 0.7),
    "vintage": Mood(("2e2620", "a3835c", "f5e6c0"), 0.55, 0.6, 1.02, 0.88, vignette=0.4),
}  # fmt: skip


def set_mood(name: str, image: Tensor, scene: Scene) -> Tensor:
    """The picture in that mood; pointwise, so any strip of it may be given."""
    mood, grid = MOODS[name], scene.grid
    tone = saturate(image, mood.saturation)
    tone = ((tone - 0.45) * mood.contrast + 0.45) * mood.exposure
    if mood.lamps:
        tone = _lit(tone, mood, scene)
    tone = tone.clamp(0, 1)
    tone = mix(tone, palette(luminance(tone), mood.palette), mood.grade)
    if mood.air:
        veil, density = mood.air
        tone = mix(tone, colour(veil, image), density * (1.15 - grid.down))
    if mood.clouds:
        tint, cells, density = mood.clouds
        drift = ((grid.clouds(1, cells) - 0.42) * 3).clamp(0, 1)
        tone = screen(tone, colour(tint, image) * drift * density)
    if mood.vignette:
        tone = tone * (1 - corners(scene) * mood.vignette)
    out = mix(image, tone, scene.amount(0.92))
    if mood.particles:
        out = _with_particles(out, mood.particles, scene)
    return out


def palette(grey: Tensor, codes: tuple[str, ...]) -> Tensor:
    """Grey n x 1 x h x w to the colours of a ramp whose stops are evenly spaced."""
    ramp = [colour(code, grey) for code in codes]
    out = ramp[0]
    for number, (low, high) in enumerate(pairwise(ramp)):
        out = out + (high - low) * (grey * (len(ramp) - 1) - number).clamp(0, 1)
    return out


def corners(scene: Scene) -> Tensor:
    """0 in the middle to about 1 in the corners, 1 x 1 x rows x w."""
    y, x = scene.grid.down * 2 - 1, scene.grid.across * 2 - 1
    far = (y * y + x * x) / 2
    return far * far * (3 - far * 2)


def _lit(image: Tensor, mood: Mood, scene: Scene) -> Tensor:
    grid = scene.grid
    for code, x, y, radius, power in mood.lamps:
        dy = (grid.down - y) * (grid.height / grid.unit)
        dx = (grid.across - x) * (grid.width / grid.unit)
        near = (1 - (dy * dy + dx * dx).sqrt() / radius).clamp_min(0)
        image = screen(image.clamp(0, 1), colour(code, image) * (near * near * power))
    return image


def _with_particles(image: Tensor, row: tuple[str, str, float, float, float], scene: Scene) -> Tensor:
    """Layers from near (large, few) to far (small, many); each pass of the iterative filters adds one."""
    shape, code, cells, rarity, power = row
    for layer in range(max(scene.passes)):
        here = scene.each([power * min(1.0, strength) * (count > layer) for strength, count in
                           zip(scene.strengths, scene.passes, strict=True)])  # fmt: skip
        cover = sprite(shape, scene, cells * 1.6**layer, rarity, 5 + layer) * here * 0.85**layer
        tint = colour(code, image)
        image = screen(image, tint * cover) if shape == "stars" else mix(image, tint, cover)
    return image


def sprite(shape: str, scene: Scene, cells: float, rarity: float, stream: int) -> Tensor:
    """Cover 0-1 of one layer of particles, n x 1 x rows x w."""
    points = scene.grid.particles(stream, cells, rarity, drift=0.37)
    match shape:
        case "discs":
            return points.discs(0.16)
        case "rings":
            return points.rings(0.34)
        case "leaves":
            return points.leaves(0.33)
        case "stars":
            return points.stars(0.45)
        case "streaks":
            return points.streaks()
    raise ValueError(shape)


def ramp_of(codes: list[str]) -> tuple[str, ...]:
    """Colours as a ramp from black to white through them, dark ones first (duotone and tritone printing)."""
    by_light = sorted(codes, key=lambda code: float(luminance(colour(code, torch.zeros(1))).item()))
    return ("0a0812", *by_light, "fffaf0")
