"""Patch-based completion: a hole is filled with patches of the same picture that agree where they overlap.

The method is space-time completion (Wexler, Shechtman, Irani 2007) with PatchMatch (Barnes et al. 2009) as its search;
the texture plane, the onion-peel start and the sharp last vote are those of Newson et al. 2014. From coarse to fine:
every patch that touches the hole (a *target*) looks for its nearest neighbour among the patches that are wholly known
(its *source*), then every hole pixel becomes the weighted mean of what the patches over it propose; repeat.

One flat list of targets holds the patches of all items of a batch. An item's result owes nothing to its companions, to
the last bit: pixels, patch distances and vote weights are whole numbers below 2**24, whose float32 sums are exact in
any order, and chance is a hash of (seed, round, place) instead of a generator's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import checkpoint
from models.tensors import box

CHUNK = 8_192  # patches compared at a time: 49 taps x 4 planes x float32 of them stay near the cache
FAR = float(2**24)
COMPARED = 3_000_000  # target-source pairs per layer of the first level; where there are more, sources are thinned out
LAYERS = 64
NEARBY = 20_000  # squared difference per pixel that one picture's length of distance counts for at the start


def mix(x: Tensor) -> Tensor:
    """A well-mixed 32-bit hash of each (int64) number; the constants are below 2**31, so that no product overflows."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dilate(hole: Tensor, r: int) -> Tensor:
    """Booleans N x H x W, grown by `r` pixels in every direction."""
    grown = F.max_pool2d(hole[:, None].float(), (2 * r + 1, 1), 1, (r, 0))
    return F.max_pool2d(grown, (1, 2 * r + 1), 1, (0, r))[:, 0] > 0


def halve(planes: Tensor) -> Tensor:
    """Sums of 2 x 2 pixels, float N x C x H x W; odd edges count twice."""
    height, width = planes.shape[2:]
    planes = F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return planes[:, :, ::2, ::2] + planes[:, :, 1::2, ::2] + planes[:, :, ::2, 1::2] + planes[:, :, 1::2, 1::2]


def pull_push(planes: Tensor, known: Tensor) -> Tensor:
    """A smooth filling of what is not known (Gortler et al. 1996): averages of the known, coarse to fine.

    `planes` float N x C x H x W of whole numbers, `known` float N x 1 x H x W of 0 and 1; known pixels come back as
    they are. An item of which nothing is known comes back as its own mean."""
    checkpoint()
    if planes.shape[2] * planes.shape[3] == 1:
        return planes
    weight = halve(known)
    mean = (halve(planes * known) / weight.clamp_min(1)).round_()
    nothing = ~(known > 0).flatten(1).any(1).view(-1, 1, 1, 1)
    mean = torch.where(nothing, (halve(planes) / 4).round_(), mean)
    if bool((weight == 0).any()):
        mean = pull_push(mean, ((weight > 0) & ~nothing).float())
    smooth = mean.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : planes.shape[2], : planes.shape[3]]
    return torch.where(known > 0, planes, box(smooth, 1).round_())


def busyness(rgb: Tensor, known: Tensor) -> Tensor:
    """How textured the known surroundings are: mean absolute gradient of 17 x 17 pixels, whole numbers 0..255.

    It is measured once, at full size, and then filled in like a colour. Without it the mean of many textured patches,
    which is smooth, would call for smooth patches, and the filling would end as a flat blot."""
    grey = (rgb[:, 0:1].float() + rgb[:, 1:2].float() * 2 + rgb[:, 2:3].float()).div_(4).round_()
    total, count = torch.zeros_like(grey), torch.zeros_like(grey)
    for axis in (2, 3):
        length = grey.shape[axis] - 1
        both = known.narrow(axis, 0, length) * known.narrow(axis, 1, length)
        total.narrow(axis, 0, length).add_((grey.narrow(axis, 1, length) - grey.narrow(axis, 0, length)).abs_() * both)
        count.narrow(axis, 0, length).add_(both)
    return (box(total, 8) / box(count, 8).clamp_min_(1 / 17**2) * 8).round_().clamp_(0, 255)


@dataclass(slots=True)
class Level:
    """One size of the pyramid: `planes` uint8 N x 4 x H x W (red, green, blue, busyness) and `hole` bool N x H x W."""

    planes: Tensor
    hole: Tensor


def pyramid(rgb: Tensor, hole: Tensor, smallest: int) -> list[Level]:
    """Fine to coarse, while the shorter side stays at least `smallest`. A coarse pixel is the mean of the known pixels
    below it, and belongs to the hole as soon as one of them does. `rgb` is uint8 N x 3 x H x W."""
    busy = busyness(rgb, (~hole)[:, None].float())
    levels = [Level(torch.cat([rgb, busy.to(torch.uint8)], 1), hole)]
    while min(levels[-1].hole.shape[1:]) // 2 >= smallest:
        fine = levels[-1]
        known = (~fine.hole)[:, None].float()
        weight = halve(known)
        total = weight.clamp_min(1)
        means = [(halve(plane * known) / total).round_().to(torch.uint8) for plane in fine.planes.split(1, 1)]
        levels.append(Level(torch.cat(means, 1), weight[:, 0] < 4))
    return levels


class Canvas:
    """A level being filled: its pixels packed four bytes to a word, its targets and their sources.

    Places are flat int32 numbers (item * H + y) * W + x. `targets` (P) are the centres of patches that touch the hole,
    `sources` (P) the centre of each one's present neighbour, `distance` (P) their squared difference."""

    def __init__(self, level: Level, patch: int, seeds: Tensor) -> None:
        self.hole, self.seeds = level.hole, seeds
        self.count, self.height, self.width = level.hole.shape
        self.area = self.height * self.width
        self.r = r = patch // 2
        device = level.hole.device
        reach = torch.arange(-r, r + 1, dtype=torch.int32, device=device)
        self.offsets = (reach[:, None] * self.width + reach).flatten()
        inside = torch.zeros_like(level.hole)
        inside[:, r : self.height - r, r : self.width - r] = True
        touched = dilate(level.hole, r)
        self.valid = (inside & ~touched).flatten()
        self.pixels = places(level.hole)
        self.targets = places(inside & touched)
        self.index = torch.full((level.hole.numel(),), -1, dtype=torch.int32, device=device)  # place -> row of targets
        self.index[self.targets.long()] = torch.arange(len(self.targets), dtype=torch.int32, device=device)
        self.item = self.targets.div(self.area, rounding_mode="floor")
        self.place = self.targets - self.item * self.area  # inside its item
        self.choices = places(self.valid)
        self.choice_counts = self.valid.view(self.count, -1).sum(1)
        self.round = 0
        self.packed = pack(level.planes)
        self.sources = self._anywhere()
        self.distance = torch.full((len(self.targets),), FAR, device=device)

    def patches(self, centres: Tensor) -> Tensor:
        """float len(centres) x (taps * 4)."""
        taps = self.packed.index_select(0, (centres[:, None] + self.offsets).flatten())
        return taps.view(torch.uint8).view(len(centres), 4 * len(self.offsets)).float()

    # --- the search -----------------------------------------------------------------------------------------------

    def inherit(self, coarse: Canvas) -> None:
        """Starts from the level above: each target takes its parent's source, in twice the distance."""
        y, x, up, r = self.place // self.width, self.place % self.width, coarse.width, self.r
        py, px = (y // 2).clamp_(r, coarse.height - 1 - r), (x // 2).clamp_(r, up - 1 - r)
        row = coarse.index.index_select(0, self.item * coarse.area + py * up + px)
        source = coarse.sources.index_select(0, row.clamp_min(0)) % coarse.area
        found = self._place(y + 2 * (source // up - py), x + 2 * (source % up - px))
        good = (row >= 0) & self.valid.index_select(0, found)
        self.sources = torch.where(good, found, self.sources)

    def search(self, local: bool) -> None:
        """One round of PatchMatch on the picture as it is now: what the neighbours found, then random places in ever
        smaller circles; `local` leaves out the widest, once the field has settled."""
        self.distance.fill_(FAR)
        self._offer(self.sources)
        for step in (1, 2, 1):
            for delta in (-step, step, -step * self.width, step * self.width):
                row = self.index.index_select(0, (self.targets + delta).clamp_(0, len(self.index) - 1))
                found = self.sources.index_select(0, row.clamp_min(0)) - delta
                self._offer(torch.where(row >= 0, found, self.sources))
        radius = max(self.height, self.width) // (8 if local else 1)
        while radius >= 1:
            chance = self._chance()
            source = self.sources % self.area
            dy = (chance & 0xFFFF) * (2 * radius + 1) // 65536 - radius
            dx = (chance >> 16) * (2 * radius + 1) // 65536 - radius
            self._offer(self._place(source // self.width + dy, source % self.width + dx))
            radius //= 3

    def _offer(self, found: Tensor) -> None:
        """Each target takes the source it is offered, where that one is valid and nearer than its own."""
        good = (found != self.sources) | (self.distance == FAR)
        good &= self.valid.index_select(0, found.clamp(0, len(self.valid) - 1))
        for rows in good.nonzero()[:, 0].split(CHUNK):
            checkpoint()
            offered = found[rows]
            distance = self.patches(self.targets[rows]).sub_(self.patches(offered)).square_().sum(1)
            nearer = distance < self.distance[rows]
            rows = rows[nearer]
            self.distance[rows] = distance[nearer]
            self.sources[rows] = offered[nearer]

    def _place(self, y: Tensor, x: Tensor) -> Tensor:
        """The place at y, x of each target's item, moved inside so that its patch does not leave the picture."""
        y, x = y.clamp(self.r, self.height - 1 - self.r), x.clamp(self.r, self.width - 1 - self.r)
        return ((self.item * self.height + y) * self.width + x).int()

    def _chance(self) -> Tensor:
        """A fresh 32-bit random number (int64) per target."""
        self.round += 1
        return mix(mix(self.seeds + self.round * 8191).index_select(0, self.item) ^ self.place)

    def _anywhere(self) -> Tensor:
        """A random source for each target."""
        starts = (self.choice_counts.cumsum(0) - self.choice_counts).index_select(0, self.item)
        chosen = self._chance() % self.choice_counts.index_select(0, self.item).clamp_min(1)
        return self.choices.index_select(0, starts + chosen)

    # --- the vote -------------------------------------------------------------------------------------------------

    def weights(self) -> Tensor:
        """What each target's vote counts, whole numbers 1..255: falls with its distance, on the scale of the 75th
        percentile of its item's distances."""
        own = self.distance.split(torch.bincount(self.item, minlength=self.count).tolist())
        scales = torch.stack([distances.kthvalue(1 + (len(distances) - 1) * 3 // 4).values for distances in own])
        ratio = self.distance / scales.clamp_min_(len(self.offsets)).index_select(0, self.item) * 2
        return (255 / (1 + ratio * ratio)).round_().clamp_min_(1)

    def vote(self, pixels: Tensor, weights: Tensor | None) -> Tensor:
        """float len(pixels) x 4: the weighted mean of what the patches over each pixel propose; without weights, what
        the nearest of them proposes."""
        return torch.cat([self._vote(part, weights) for part in pixels.split(CHUNK * 4)]).round_()

    def _vote(self, pixels: Tensor, weights: Tensor | None) -> Tensor:
        total = torch.zeros(len(pixels), 4, device=pixels.device)
        share = torch.full((len(pixels), 1), 0.0 if weights is not None else FAR * 2, device=pixels.device)
        for offset in self.offsets:
            checkpoint()
            row = self.index.index_select(0, (pixels - offset).clamp_(0, len(self.index) - 1))
            absent, row = row < 0, row.clamp_min_(0)
            proposal = self.packed.index_select(0, self.sources.index_select(0, row) + offset)
            colour = proposal.view(torch.uint8).view(-1, 4).float()
            if weights is None:
                distance = self.distance.index_select(0, row).masked_fill_(absent, FAR * 2)[:, None]
                total = torch.where(distance < share, colour, total)
                share = torch.minimum(share, distance)
            else:
                weight = weights.index_select(0, row).masked_fill_(absent, 0)[:, None]
                total += colour.mul_(weight)
                share += weight
        return total if weights is None else total / share.clamp_min(1)

    def repaint(self, pixels: Tensor, weights: Tensor | None) -> None:
        """Votes on these pixels and puts the result into the picture."""
        self.packed[pixels.long()] = self.vote(pixels, weights).to(torch.uint8).view(torch.int32)[:, 0]

    # --- the start and the end ------------------------------------------------------------------------------------

    def peel(self) -> None:
        """The start at the first level: fills the hole layer by layer from its rim. Patches are compared by their
        trusted pixels only (the known ones and the layers already filled); the fewer, the less their votes count. What
        then still lies deeper starts smooth."""
        trusted = ~self.hole
        for _ in range(LAYERS):
            layer = dilate(trusted, max(1, self.r // 2)) & ~trusted
            if not bool(layer.any()):
                return
            share = self._compare_all(trusted.flatten(), dilate(layer, self.r).flatten()) / len(self.offsets)
            share *= share
            self.repaint(places(layer), (self.weights() * (share * share)).round_())
            trusted |= layer
        planes = self.packed.view(torch.uint8).view(self.count, self.height, self.width, 4).permute(0, 3, 1, 2).float()
        self.packed = pack(pull_push(planes, trusted[:, None].float()).to(torch.uint8))

    def _compare_all(self, trusted: Tensor, wanted: Tensor) -> Tensor:
        """Finds the nearest source of every target in `wanted`, among all, by its trusted pixels, of which it returns
        the number. Sources near in place are preferred: half a patch fits half the picture, but mostly the wrong half.

        The difference is expanded into products of matrices; bytes taken from -128 keep those exact as well."""
        shares = torch.zeros_like(self.distance)
        self.distance.fill_(FAR)
        step = NEARBY / max(self.height, self.width)
        choices = self.choices.split(self.choice_counts.tolist())
        for number, choice in enumerate(choices):
            rows = ((self.item == number) & wanted.index_select(0, self.targets)).nonzero()[:, 0]
            sources = choice[:: -(-len(choice) // min(max(COMPARED // max(1, len(rows)), 256), 3_000))]
            patches = self.patches(sources).sub_(128).T
            squares = patches * patches
            for part in rows.split(512):
                checkpoint()
                centres = self.targets[part]
                known = trusted.index_select(0, (centres[:, None] + self.offsets).flatten()).float()
                known = known.view(len(part), len(self.offsets))
                shares[part] = share = known.sum(1)
                own = self.patches(centres).sub_(128)
                known = known.repeat_interleave(4, 1)
                distance = known @ squares - (known * own) @ patches * 2 + (known * own * own).sum(1, keepdim=True)
                away = (centres[:, None] // self.width - sources // self.width).abs()
                away = torch.maximum(away, (centres[:, None] % self.width - sources % self.width).abs())
                best = (distance + (away * share[:, None] * step).round_()).min(1)
                self.distance[part] = best.values * len(self.offsets) / share.clamp_min(1)
                self.sources[part] = sources[best.indices]
        return shares

    def settle(self) -> Tensor:
        """The picture, uint8 N x 3 x H x W, its filling shifted in colour so that it meets the known rim without a seam
        (Farbman et al. 2009): what the patches propose for the rim differs from what is there by a light and shade
        that is spread smoothly into the hole. A great difference is no matter of light, and does not count."""
        bytes_ = self.packed.view(torch.uint8).view(self.count, self.height, self.width, 4)
        picture = bytes_[..., :3].permute(0, 3, 1, 2)
        rim = dilate(self.hole, self.r) & ~self.hole
        where = places(rim)
        actual = self.packed.index_select(0, where).view(torch.uint8).view(-1, 4).float()
        shift = (actual - self.vote(where, self.weights()))[:, :3]
        near = (shift.abs().amax(1, keepdim=True) < 32).float()
        light = torch.cat([shift * near, near], 1).split(rim.flatten(1).sum(1).tolist())
        for image, hole, edge, values in zip(picture, self.hole, rim, light, strict=True):
            rows, columns = ((edge | hole).any(axis).nonzero()[:, 0] for axis in (1, 0))
            part = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
            hole, edge = hole[part], edge[part]
            canvas = torch.zeros(1, 4, *hole.shape, device=hole.device)
            canvas[0, :, edge] = values.T
            spread = box(pull_push(canvas[:, :3], canvas[:, 3:]), 4)[0].round_()
            inner = image[:, *part]
            inner.copy_(torch.where(hole, (inner + spread).clamp_(0, 255).to(torch.uint8), inner))
        return picture


def places(where: Tensor) -> Tensor:
    """The places at which a boolean N x H x W is true, int32, ascending."""
    return where.flatten().nonzero()[:, 0].int()


def pack(planes: Tensor) -> Tensor:
    """uint8 N x 4 x H x W as one int32 per pixel: one gather instead of four."""
    return planes.permute(0, 2, 3, 1).contiguous().view(torch.int32).flatten()


def complete(
    levels: list[Level],
    patch: int,
    seeds: Tensor,
    passes: int,
    start: int,
    stop: int,
    report: Callable[[float], None],
) -> Tensor:
    """The picture with its holes filled, uint8 N x 3 x H x W.

    `start` is the first, coarsest level, on which every item has sources; levels finer than `stop` only copy along the
    field of level `stop`. `report` is told the fraction done."""
    coarse: Canvas | None = None
    for depth in range(start, -1, -1):
        canvas = Canvas(levels[depth], patch, seeds)
        if coarse is None:
            canvas.peel()
        else:
            canvas.inherit(coarse)
            canvas.repaint(canvas.pixels, torch.ones_like(canvas.distance))
        rounds = 0 if depth < stop else passes * (3 if depth > 1 else 1)
        for number in range(rounds):
            canvas.search(local=coarse is not None)
            canvas.repaint(canvas.pixels, canvas.weights())
            report((start - depth + (number + 1) / rounds) / (start + 1))
        coarse = canvas
    assert coarse is not None
    if stop == 0:
        coarse.search(local=True)
    coarse.repaint(coarse.pixels, None)
    return coarse.settle()
