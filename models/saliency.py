"""Which pixels belong to the subject: a soft cut-out of one picture, without a trained network.

Three published steps. (1) Saliency by robust background detection (Zhu, Liang, Wei, Sun 2014): regions that touch the
picture's border much, for their size, are background; contrast against those is saliency; a least-squares problem
smooths it. (2) Colour models of subject and background start from it and are sharpened as in GrabCut (Rother,
Kolmogorov, Blake 2004), with mean-field inference (Kraehenbuehl, Koltun 2011) in place of graph cuts. (3) The edge is
laid onto the full-size picture by a fast guided filter (He, Sun 2015).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.filters import resize
from models.tensors import blur, box, luminance, rgb_to_lab

REGION_SIDE = 128  # regions are found on a copy of this longer side
CUT_SIDE = 272  # and the cut on one of this
REGIONS = 260
EDGE_PIXELS = 2_500_000
DOUBT = 2.2  # border connectivity up to which a region in the middle counts as subject whatever its contrast


def foreground(image: Tensor, threshold: float = 0.5) -> Tensor:
    """Probability that a pixel is subject, 1 x 1 x H x W in 0..1, of one picture 1 x 3 x H x W in 0..1.

    `threshold` 0-1: how salient a region must be; less keeps more. A picture in which nothing stands out (one colour,
    one pixel) gives 1 everywhere: nothing can be told apart."""
    small = _fit(image, CUT_SIDE)
    lab = rgb_to_lab(small)
    if float((lab.amax((2, 3)) - lab.amin((2, 3))).max()) < 4.0:
        return torch.ones_like(image[:, :1])
    grey = luminance(small)
    contrast = saliency(resize(lab, *_size(image, REGION_SIDE)))
    prior = resize(contrast, *small.shape[2:])
    return _to_full_size(image, _tidied(_cut(lab, grey, prior, threshold)))


def _tidied(cut: Tensor) -> Tensor:
    """Holes are filled (a face between hair and collar) and specks dropped: parts below a tenth of the largest. Judged
    on a smaller copy, after small gaps are closed."""
    h, w = cut.shape[2:]
    small = resize(cut, max(1, h // 3), max(1, w // 3))
    solid = F.max_pool2d(small, 5, 1, 2) > 0.5
    gaps = _parts(~solid)
    outside = torch.cat([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]).unique()
    holes = ((gaps > 0) & ~torch.isin(gaps, outside)).float().view_as(small)
    parts = _parts(solid)
    sizes = torch.bincount(parts.flatten())
    sizes[0] = 0
    kept = (sizes * 10 >= sizes.max())[parts].float().view_as(small)
    cut = torch.maximum(cut, resize(F.max_pool2d(holes, 5, 1, 2), h, w))
    return cut * resize(F.max_pool2d(kept, 3, 1, 1), h, w)


def _parts(mask: Tensor) -> Tensor:
    """Numbers of connected parts of a mask 1 x 1 x h x w, h x w (0 outside it): the largest number spreads."""
    h, w = mask.shape[2:]
    numbers = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32).view(1, 1, h, w) * mask
    while True:
        before = numbers
        for _ in range(16):
            numbers = F.max_pool2d(numbers, 3, 1, 1) * mask
        if torch.equal(before, numbers):
            return numbers.long()[0, 0]


def saliency(lab: Tensor) -> Tensor:
    """Robust background detection: 1 x 1 x h x w in 0..1 of a Lab picture 1 x 3 x h x w."""
    h, w = lab.shape[2:]
    labels, colours, places, areas = _regions(lab)
    border = torch.zeros(len(areas), device=lab.device)
    border[torch.cat([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = 1.0
    distance = _pairwise(colours)
    touching = _adjacent(labels, len(areas))
    geodesic = _shortest(torch.where(touching | (border[:, None] * border > 0), distance, distance.new_tensor(1e4)))
    alike = torch.exp(-geodesic * geodesic / (2 * 7.0**2))
    connectivity = (alike * border).sum(1) / alike.sum(1).sqrt()
    background = 1 - torch.exp(-connectivity * connectivity / 2)
    closeness = torch.exp(-_pairwise(places).square() / (2 * 0.4**2))
    contrast = (distance * closeness * background).sum(1)
    contrast = _stretch(contrast)
    # minimise  sum bg s² + sum contrast (s-1)² + sum w (s_i - s_j)²  over the regions' saliency s
    links = (torch.exp(-distance * distance / (2 * 10.0**2)) + 0.1) * touching
    system = torch.diag(links.sum(1) + background * 5 + contrast) - links
    solved = torch.linalg.solve(system + torch.eye(len(areas), device=lab.device) * 1e-4, contrast)
    middle = (places - places.new_tensor([h, w]) / max(h, w) / 2) / (places.new_tensor([h, w]) / max(h, w) / 2)
    central = torch.exp(-middle.square().sum(1) * 1.2 - connectivity * connectivity / (2 * DOUBT**2))
    return torch.maximum(_stretch(solved), central)[labels].view(1, 1, h, w)


def _regions(lab: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Superpixels as SLIC finds them (Achanta et al. 2012), every pixel against every centre. Labels h x w, and mean
    colour, mean place (0-1) and pixel count per region."""
    h, w = lab.shape[2:]
    step = max(1.0, (h * w / REGIONS) ** 0.5)
    rows, columns = max(1, round(h / step)), max(1, round(w / step))
    y, x = torch.meshgrid(
        torch.arange(h, device=lab.device), torch.arange(w, device=lab.device), indexing="ij"
    )  # fmt: skip
    pixels = torch.cat([lab[0].flatten(1).T, torch.stack([y.flatten(), x.flatten()], 1).float() * (12 / step)], 1)
    labels = ((y * rows // h) * columns + x * columns // w).flatten()
    count = rows * columns
    for _ in range(5):
        members = _members(labels, count)
        sizes = members.sum(0)
        centres = (members.T @ pixels) / sizes.clamp_min(1)[:, None]
        gap = torch.addmm((centres * centres).sum(1) + (sizes < 1) * 1e9, pixels, centres.T, alpha=-2)
        labels = gap.argmin(1)
    kept, labels = labels.unique(return_inverse=True)
    members = _members(labels, len(kept))
    sizes = members.sum(0)
    means = (members.T @ pixels) / sizes[:, None]
    return labels.view(h, w), means[:, :3], means[:, 3:] * (step / 12) / max(h, w), sizes


def _members(labels: Tensor, count: int) -> Tensor:
    """pixels x regions, 1 where the pixel is of the region: sums by matrix product are the same in every run, those by
    atomic additions are not."""
    return torch.zeros(len(labels), count, device=labels.device).scatter_(1, labels[:, None], 1.0)


def _adjacent(labels: Tensor, count: int) -> Tensor:
    near = torch.eye(count, dtype=torch.bool, device=labels.device)
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        near[a.flatten(), b.flatten()] = True
        near[b.flatten(), a.flatten()] = True
    return near


def _shortest(edges: Tensor) -> Tensor:
    """All shortest paths (Floyd, Warshall); small steps inside one surface cost nothing, as Zhu et al. have it."""
    off = edges + torch.eye(len(edges), device=edges.device) * 1e4
    paths = (edges - off.amin(1).mean().clamp_max(1e3)).clamp_min(0)
    paths = paths * (1 - torch.eye(len(edges), device=edges.device))
    for k in range(len(edges)):
        paths = torch.minimum(paths, paths[:, k : k + 1] + paths[k])
    return paths


def _pairwise(points: Tensor) -> Tensor:
    return (points[:, None] - points[None]).square().sum(2).sqrt()


def _stretch(values: Tensor) -> Tensor:
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low).clamp_min(1e-6)


def _cut(lab: Tensor, grey: Tensor, prior: Tensor, threshold: float) -> Tensor:
    """Two colour mixtures and smoothness, alternating; 1 x 1 x h x w in 0..1."""
    h, w = grey.shape[2:]
    colours = lab[0].flatten(1).T
    border = _otsu(prior) * (0.4 + threshold)
    belief = 0.5 + 0.5 * torch.tanh((prior - border) * 8)
    log_prior = (prior - border).clamp(-0.35, 0.35) * 7
    radius = max(1, max(h, w) // 60)
    for _ in range(4):
        q = belief.flatten()
        evidence = _mixture(colours, q * q) - _mixture(colours, (1 - q) * (1 - q))
        unary = (evidence.view(1, 1, h, w) * 0.6).clamp(-5, 5) + log_prior
        for _step in range(4):
            near = _guided(grey, belief, radius, 0.002) * 2 - 1
            wide = blur(belief, 3.0) * 2 - 1
            belief = 0.5 + 0.5 * torch.tanh((unary + near * 4.0 + wide * 1.5) / 2)
        log_prior = log_prior * 0.8
    return belief


def _mixture(colours: Tensor, weights: Tensor, parts: int = 5, rounds: int = 4) -> Tensor:
    """Log density per pixel of a Gaussian mixture (diagonal) fitted to the weighted colours by EM."""
    total = weights.sum().clamp_min(1e-3)
    mean = (colours * weights[:, None]).sum(0) / total
    centres = [mean]
    gap = (colours - mean).square().sum(1)
    for _ in range(parts - 1):  # farthest-first, softened by the weights: no random start
        centres.append(colours[(gap.sqrt() * weights).argmax()])
        gap = torch.minimum(gap, (colours - centres[-1]).square().sum(1))
    means = torch.stack(centres)
    spread = torch.full_like(means, 12.0**2)
    share = torch.full((parts,), 1 / parts, device=colours.device)
    for number in range(rounds + 1):
        log = torch.stack([
            share[k].log() - 0.5 * ((colours - means[k]).square() / spread[k] + spread[k].log()).sum(1)
            for k in range(parts)
        ])  # fmt: skip
        top = log.amax(0)
        density = top + (log - top).exp().sum(0).log()
        if number == rounds:
            break
        duty = (log - density).exp() * weights
        size = duty.sum(1).clamp_min(1e-3)
        means = (duty @ colours) / size[:, None]
        spread = torch.stack([(duty[k] @ (colours - means[k]).square()) / size[k] for k in range(parts)])
        spread, share = spread.clamp_min(2.5**2), size / size.sum()
    return density


def _otsu(values: Tensor) -> Tensor:
    """The threshold that parts the values best in two (Otsu 1979)."""
    steps = torch.linspace(0.05, 0.95, 46, device=values.device)
    flat = values.flatten()
    best = []
    for step in steps:
        high = (flat > step).float()
        n, rest = high.sum().clamp_min(1), (1 - high).sum().clamp_min(1)
        gap = (flat * high).sum() / n - (flat * (1 - high)).sum() / rest
        best.append(n * rest * gap * gap)
    return steps[torch.stack(best).argmax()]


def _guided(guide: Tensor, values: Tensor, radius: int, eps: float) -> Tensor:
    slope, offset = _coefficients(guide, values, radius, eps)
    return slope * guide + offset


def _coefficients(guide: Tensor, values: Tensor, radius: int, eps: float) -> tuple[Tensor, Tensor]:
    mean_guide, mean = box(guide, radius), box(values, radius)
    slope = (box(guide * values, radius) - mean_guide * mean) / (
        (box(guide * guide, radius) - mean_guide * mean_guide).clamp_min(0) + eps
    )
    return box(slope, radius), box(mean - slope * mean_guide, radius)


def _to_full_size(image: Tensor, cut: Tensor) -> Tensor:
    """Fast guided filter: line coefficients found on a smaller copy, applied to the full-size guide."""
    h, w = image.shape[2:]
    factor = max(1.0, (h * w / EDGE_PIXELS) ** 0.5)
    size = max(1, round(h / factor)), max(1, round(w / factor))
    guide = luminance(resize(image, *size))
    slope, offset = _coefficients(guide, resize(cut, *size), max(1, max(size) // 100), 0.0005)
    return (resize(slope, h, w) * luminance(image) + resize(offset, h, w)).clamp_(0, 1)


def _size(image: Tensor, side: int) -> tuple[int, int]:
    h, w = image.shape[2:]
    factor = max(1.0, max(h, w) / side)
    return max(1, round(h / factor)), max(1, round(w / factor))


def _fit(image: Tensor, side: int) -> Tensor:
    return resize(image, *_size(image, side))
