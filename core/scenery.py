"""Words that name a mood and a thing alike: the snow of "a street in snow" is weather, that of "make the snow yellow"
lies there and cannot be found. And the other way round: the sky of "a sunset with an orange sky" is the mood's own.

Such a word is a thing's name where a colour or a degree is said of it, and where it is half of another name ("snow
leopard"). A part of a scene has the mood's look where it stands behind that look and the prompt names a mood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from core import objects
from core.objects import Phrase
from core.vocabulary import STAGES

THINGS = frozenset({  # a look before or behind them is theirs
    "snow", "ice", "star", "stars", "flower", "flowers", "blossom", "blossoms", "palm", "palms", "palm tree",
    "palm trees", "gear", "gears", "coral", "雪", "冰", "花朵", "鲜花", "珊瑚", "齿轮",
})  # fmt: skip
PLACES = frozenset({  # a look is theirs where they are made to have it; "a green forest" is a scene
    "cherry blossom", "cherry blossoms", "garden", "meadow", "castle", "knight", "ocean", "sea", "aquarium", "nebula",
    "galaxy", "forest", "woods", "jungle", "rainforest", "beach", "island", "desert", "ruins", "frost", "rain", "fog",
    "mist", "clockwork", "coral reef", "falling leaves", "fallen leaves", "firefly", "fireflies", "樱花", "花园",
    "城堡", "骑士", "海洋", "星云", "银河", "星空", "森林", "丛林", "树林", "海滩", "沙滩", "沙漠", "废墟", "棕榈",
    "落叶", "枫叶", "雾", "雨",
})  # fmt: skip
MAKING = frozenset({
    "make", "making", "turn", "keep", "let", "paint", "dye", "recolour", "render", "让", "把", "使", "将",
})  # fmt: skip
FACING = frozenset({"warmer", "cooler", "soft"})  # "cold snow" says what snow is
FIRST = frozenset({
    "snow", "ice", "winter", "summer", "spring", "autumn", "fall", "night", "rain", "star", "sea", "space", "oil",
    "雪", "冰", "雨",
})  # fmt: skip
SECOND = frozenset({
    "leopard", "leopards", "owl", "owls", "fox", "bear", "bears", "cube", "cubes", "boot", "boots", "coat", "coats",
    "jacket", "dress", "dresses", "gown", "hat", "scarf", "sweater", "clothes", "globe", "board", "mobile", "man",
    "cone", "queen", "lion", "turtle", "shell", "horse", "ship", "suit", "fish", "wars", "onion", "lamp", "rig", "豹",
    "人", "糕", "橇", "鞋", "靴", "衣", "箱", "块", "鸮",
})  # fmt: skip
PARTS = frozenset({"sky", "skies", "cloud", "clouds", "leaves", "foliage", "天空", "云", "云朵"})


def bound(phrases: Sequence[Phrase]) -> frozenset[int]:
    """The places of the phrases that are meant for a thing, with the moods that are its name."""
    names = frozenset(at for at in range(len(phrases)) if _is_half_a_name(phrases, at))
    plain = _as(phrases, names, "unknown")
    plain = _as(plain, _parts_of_a_mood(plain), "aspect")
    found = objects.bound(plain)
    nouns = frozenset(at for at in range(len(plain)) if _may_be_a_thing(plain, at))
    if nouns:
        seen = _as(plain, nouns, "unknown")
        theirs = [at for at in objects.looks(seen) if at not in found and _is_theirs(seen, at)]
        clauses = _clauses(seen)
        told = {clauses[at] for at in theirs}
        found |= {*theirs, *(at for at in nouns if clauses[at] in told)}
    return found | names


def _as(phrases: Sequence[Phrase], places: frozenset[int], kind: str) -> Sequence[Phrase]:
    """The phrases with those at `places` of another kind."""
    if not places:
        return phrases
    return [replace(each, kind=kind, bindable=False) if at in places else each for at, each in enumerate(phrases)]


def _is_half_a_name(phrases: Sequence[Phrase], at: int) -> bool:
    here, then = phrases[at], phrases[at + 1] if at + 1 < len(phrases) else None
    return here.kind == "op" and here.text in FIRST and then is not None and then.text in SECOND


def _may_be_a_thing(phrases: Sequence[Phrase], at: int) -> bool:
    if phrases[at].kind != "op" or (at + 1 < len(phrases) and _is_mood(phrases[at + 1])):  # a "flower garden"
        return False
    if phrases[at].text in THINGS:
        return True
    before = at - 1
    while before >= 0 and phrases[before].kind == "determiner":
        before -= 1
    return phrases[at].text in PLACES and before >= 0 and phrases[before].text in MAKING


def _is_theirs(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether a thing has this look; that stands before things seldom says where it is to be done when it is warmth."""
    faces = phrases[at].term.name in FACING and phrases[at].text != "soften"
    return objects.is_bound(phrases, at) and not (faces and objects.ahead(phrases, at))


def _clauses(phrases: Sequence[Phrase]) -> list[int]:
    """For each phrase the number of its clause."""
    return list(accumulate(int(phrase.kind in ("end", "stop")) for phrase in phrases))


def _parts_of_a_mood(phrases: Sequence[Phrase]) -> frozenset[int]:
    """The places of words such as "sky" behind a look or a mood, in a prompt that names a mood, unless more is said of
    them."""
    if not any(_is_mood(phrase) for phrase in phrases):
        return frozenset()
    return frozenset(place for at in range(1, len(phrases)) for place in _part(phrases, at))


def _part(phrases: Sequence[Phrase], at: int) -> range:
    """The places of the part that begins here; Chinese words are one phrase a character."""
    for size in (2, 1):
        text = "".join(phrase.text for phrase in phrases[at : at + size])
        if text in PARTS and all(phrase.kind == "unknown" for phrase in phrases[at : at + size]):
            before = phrases[at - 2 if phrases[at - 1].kind == "possessing" and at > 1 else at - 1]
            then = phrases[at + size] if at + size < len(phrases) else None
            said = then is not None and (then.bindable or then.kind in ("link", "verb", "to"))
            return range(at, at + size if (before.bindable or _is_mood(before)) and not said else at)
    return range(at, at)


def _is_mood(phrase: Phrase) -> bool:
    return phrase.kind == "op" and STAGES[phrase.term.name] == "mood"
