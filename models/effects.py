"""Every operation a recipe may hold, as a function of pixels: `EFFECTS[name].apply(image, scene)`.

An effect takes float32 n x 3 x h x w in 0..1, all items wanting this operation, each with its own strength, seed and
passes, and gives the same shape (the caller clips). Pointwise effects need no neighbours and may see a strip of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core.vocabulary import COLOURS
from models.filters import quantise, reduced, repeat, resize, saturate, wide_blur
from models.moods import MOODS, corners, palette, ramp_of, set_mood, sprite
from models.painting import abstract, comic, emboss, ink, oil, sketch, watercolour
from models.saliency import foreground
from models.scene import Scene, colour, mix, screen, strips
from models.tensors import blur, guided_filter, luminance, power


@dataclass(frozen=True, slots=True)
class Effect:
    apply: Callable[[Tensor, Scene], Tensor]
    pointwise: bool = True


# --- light and colour -------------------------------------------------------------------------------------------------


def brighter(image: Tensor, scene: Scene) -> Tensor:
    """A curve that lifts the middle and holds black and white (screening with itself)."""
    return mix(image, 1 - (1 - image) * (1 - image), scene.amount(0.6))


def darker(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, image * image, scene.amount(0.65))


def contrast(image: Tensor, scene: Scene) -> Tensor:
    """A smoothstep curve, applied once more than needed and blended."""
    curve = image * image * (3 - 2 * image)
    return mix(image, curve * curve * (3 - 2 * curve), scene.amount(0.6))


def flat(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, image * 0.5 + 0.27, scene.amount(0.6))


def balance(image: Tensor, scene: Scene, red: float, green: float, blue: float) -> Tensor:
    """White balance: gains per channel, luminance kept (von Kries 1902)."""
    gain = torch.tensor([red, green, blue], dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
    shifted = image * gain
    shifted = shifted * (luminance(image) / luminance(shifted).clamp_min(1e-4)).clamp(0.5, 1.6)
    return mix(image, shifted, scene.times(1.0, most=2.0))


def vivid(image: Tensor, scene: Scene) -> Tensor:
    """Vibrance: pale colours gain more than full ones, so that skin and sky do not burn."""
    spread = image.amax(1, keepdim=True) - image.amin(1, keepdim=True)
    return saturate(image, 1 + scene.times(0.9) * (1.1 - spread))


def black_and_white(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, luminance(image).expand_as(image), scene.amount(0.995))


def sepia(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, palette(luminance(image), ("1b110a", "8a6540", "f7e8c8")), scene.amount(0.93))


def tint(image: Tensor, scene: Scene) -> Tensor:
    """Duotone: the picture's greys run through the named colours, dark ones in the shadows."""
    grey = luminance(image)
    grey = mix(grey, grey * grey * (3 - 2 * grey), 0.5)
    toned = torch.cat(
        [palette(grey[i : i + 1], ramp_of([COLOURS[name] for name in params.get("colours", ())]))
         for i, params in enumerate(scene.params)]
    )  # fmt: skip
    return mix(image, mix(toned, image, 0.12), scene.amount(0.85))


def posterise(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, quantise(saturate(image, 1.3).clamp(0, 0.999), 4, 12.0), scene.amount(0.95))


def invert(image: Tensor, scene: Scene) -> Tensor:
    return mix(image, 1 - image, scene.amount(0.999))


def vignette(image: Tensor, scene: Scene) -> Tensor:
    return image * (1 - corners(scene) * scene.amount(0.75))


def grain(image: Tensor, scene: Scene) -> Tensor:
    """Film grain: strongest in the middle tones, as silver grains are (Newson et al. 2017 measure it so)."""
    noise = scene.grid.grain(90, scene.pixels(1 / 900))
    grey = luminance(image).clamp(0, 1)
    return image + noise * (0.35 + 2.6 * grey * (1 - grey)) * scene.times(0.075, most=0.25)


def sparkles(image: Tensor, scene: Scene) -> Tensor:
    """Points of light with rays, where the picture is bright more than where it is dark."""
    lit = 0.45 + 0.55 * luminance(image)
    for layer in range(max(scene.passes)):
        here = scene.each([min(1.0, 0.4 + 0.6 * strength) * (count > layer) for strength, count in
                           zip(scene.strengths, scene.passes, strict=True)])  # fmt: skip
        light = sprite("stars", scene, 9 * 1.7**layer, 0.5, 40 + layer) * here * lit
        image = screen(image, colour("fff4d6", image) * light)
    return image


# --- focus ------------------------------------------------------------------------------------------------------------


def soft(image: Tensor, scene: Scene) -> Tensor:
    """Orton effect: a blurred, screened copy laid over the sharp picture."""
    glow = repeat(image, scene.passes, lambda x: wide_blur(x, max(0.6, scene.pixels(0.008))))
    for top, bottom in strips(*image.shape[2:], len(image)):
        sharp, haze = image[:, :, top:bottom], glow[:, :, top:bottom]
        haze.copy_(mix(sharp, mix(screen(sharp, haze * 0.5), haze, 0.45), scene.amount(0.6)))
    return glow


def blurred(image: Tensor, scene: Scene) -> Tensor:
    """Gaussian blur; the strength walks through a stack of ever wider blurs."""
    depth = scene.times(3.0, most=6.0)
    for number in range(6):
        wider = repeat(image, [max(1, count // 2) for count in scene.passes],
                       lambda x, n=number: wide_blur(x, max(0.5, scene.pixels(0.003 * 2**n))))  # fmt: skip
        image = mix(image, wider, (depth - number).clamp(0, 1))
    return image


def sharpen(image: Tensor, scene: Scene) -> Tensor:
    """Unsharp mask on luminance at two radii, bounded so that no halo grows."""
    grey = luminance(image)
    detail = (grey - blur(grey, 1.0)) * 1.2 + (grey - blur(grey, 2.5)) * 0.5
    return image + (detail * scene.times(1.0)).clamp(-0.2, 0.2)


def smooth(image: Tensor, scene: Scene) -> Tensor:
    """Guided filter (He, Sun, Tang 2010): noise and pores go, edges stay."""
    radius = max(1, round(scene.pixels(0.006)))

    def calm(part: Tensor) -> Tensor:
        return repeat(part, scene.passes, lambda x: guided_filter(luminance(x), x, radius, 0.004))

    return mix(image, reduced(image, calm, 8_000_000), scene.amount(0.85))


def blur_background(image: Tensor, scene: Scene) -> Tensor:
    """The subject (see `models.saliency`) stays sharp; behind it a lens blur, in which bright points widen most."""
    keep = torch.cat([foreground(item[None]) for item in image])
    keep = (keep * 1.4 - 0.2).clamp(0, 1)

    def defocus(part: Tensor) -> Tensor:
        room = 1 - resize(keep, *part.shape[2:])
        light = power(part, 3.0) * room
        sigma = 0.012 * max(part.shape[2:])
        wide, share = light, room
        for _ in range(2):
            wide, share = wide_blur(wide, sigma), wide_blur(share, sigma)
        return power((wide / share.clamp_min(1e-3)).clamp(0, 1), 1 / 3)

    far = mix(image, reduced(image, defocus), scene.amount(0.9))
    return mix(far, image, keep)


def pixelate(image: Tensor, scene: Scene) -> Tensor:
    h, w = image.shape[2:]
    done = []
    for item, strength in zip(image.split(1), scene.strengths, strict=True):
        block = max(2, round(scene.pixels(1 / 64) * strength))
        small = resize(item, max(1, -(-h // block)), max(1, -(-w // block)))
        rows = torch.arange(h, device=image.device) * small.shape[2] // h
        columns = torch.arange(w, device=image.device) * small.shape[3] // w
        done.append(small[:, :, rows][..., columns])
    return torch.cat(done)


def turned(axes: tuple[int, ...]) -> Callable[[Tensor, Scene], Tensor]:
    return lambda image, scene: image.flip(axes)


EFFECTS: Mapping[str, Effect] = {
    "mirror": Effect(turned((3,)), False),
    "flip": Effect(turned((2,)), False),
    "rotate": Effect(turned((2, 3)), False),
    **{name: Effect(partial(set_mood, name)) for name in MOODS},
    "brighter": Effect(brighter),
    "darker": Effect(darker),
    "contrast": Effect(contrast),
    "flat": Effect(flat),
    "warmer": Effect(partial(balance, red=1.22, green=1.02, blue=0.74)),
    "cooler": Effect(partial(balance, red=0.78, green=1.0, blue=1.26)),
    "vivid": Effect(vivid),
    "muted": Effect(lambda image, scene: mix(image, saturate(image, 0.2), scene.amount(0.65))),
    "tint": Effect(tint),
    "posterise": Effect(posterise),
    "invert": Effect(invert),
    "black_and_white": Effect(black_and_white),
    "sepia": Effect(sepia),
    "watercolour": Effect(watercolour, False),
    "oil": Effect(oil, False),
    "sketch": Effect(sketch, False),
    "ink": Effect(ink, False),
    "comic": Effect(comic, False),
    "abstract": Effect(abstract, False),
    "pixelate": Effect(pixelate, False),
    "emboss": Effect(emboss, False),
    "smooth": Effect(smooth, False),
    "blur": Effect(blurred, False),
    "blur_background": Effect(blur_background, False),
    "soft": Effect(soft, False),
    "sharpen": Effect(sharpen, False),
    "sparkles": Effect(sparkles),
    "grain": Effect(grain),
    "vignette": Effect(vignette),
}
