"""Which colours and degrees of a prompt are meant for one thing in the picture ("make her eyes green", 眼睛变绿).

No operation here finds a thing, so such a word must not change the whole picture. It is bound to a thing when a word
that nobody knows stands where its noun does: behind it ("a red dress", "sharpen the eyes", "contrast of the sky") or,
with a verb, before it ("turn the car blue", "her hair is gold"), or where somebody is meant ("make her red"). A colour
is so too when such a word is anywhere ("the car, make it blue", "green for the eyes") and none for the picture does.
What lies on a thing ("a star on the flag") is no look of the picture either. Words for the picture itself ("a warm
light", "make the photo brighter") and scenes bind nothing. Each look goes `REACH` phrases far at the most.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from core.vocabulary import STAGES, Term

REACH = 10
MOST = 200  # more colours and degrees than anybody writes
WHOLES = frozenset({"picture", "scene"})
NOUNS = frozenset({"unknown", "picture", "scene", "aspect", "manner"})
ASPECTS = frozenset({"colour", "colours", "tone", "tones", "色调"})
COMPARING = frozenset({"more", "even", "更", "更加", "再"})
BECOMING = frozenset({"变成", "改成", "转成", "turned", "turns", "turn"})
ACTING = frozenset({"提亮", "增亮", "调亮", "调暗", "压暗", "变亮", "变暗", "锐化", "模糊", "平滑"})
LOCAL = frozenset({
    "brighter", "darker", "contrast", "flat", "warmer", "cooler", "vivid", "muted", "blur", "soft", "sharpen",
    "smooth", "black_and_white",
})  # fmt: skip
PRONOUNS = frozenset({"it", "thing", "things", "stuff", "它"})  # of the picture, unless a thing is named
PERSONS = frozenset({"her", "him", "them", "me", "us", "他", "她"})
ON = frozenset({"on", "around", "at", "上"})
GROUNDS = frozenset({"canvas", "paper", "linen", "silk", "wood"})  # of paintings


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a prompt, and what they mean. `kind` is the term's, but that words such as "colour" are an aspect of the
    picture; `bindable`: things have it as well as pictures."""

    term: Term
    text: str
    kind: str
    bindable: bool
    chinese: bool


@functools.lru_cache(4_096)
def phrase(term: Term, text: str) -> Phrase:
    """Those words as a phrase."""
    kind = "aspect" if term.kind == "fill" and text in ASPECTS else term.kind
    return Phrase(term, text, kind, kind == "colour" or (kind == "op" and term.name in LOCAL), text >= "㐀")


def bound(phrases: Sequence[Phrase]) -> frozenset[int]:
    """The places of the phrases that are meant for a thing, among the first `MOST` that could be."""
    places = looks(phrases)
    found = {at for at in places if is_bound(phrases, at) or _is_said_of_it(phrases, at)}
    if _names_a_thing_alone(phrases):
        found |= {at for at in places if phrases[at].kind == "colour"}
    drawn = [at for at, phrase in enumerate(phrases) if phrase.kind == "op" and _can_lie(phrase.term)][:MOST]
    return frozenset(found | {at for at in drawn if _lies_on_a_thing(phrases, at)})


def looks(phrases: Sequence[Phrase]) -> list[int]:
    """The places of the first `MOST` colours and degrees."""
    return [at for at, phrase in enumerate(phrases) if phrase.bindable][:MOST]


def _names_a_thing_alone(phrases: Sequence[Phrase]) -> bool:
    """Whether there is a word that nobody knows and none for the picture as a whole or for what it has."""
    kinds = {phrase.kind for phrase in phrases if phrase.text not in PRONOUNS}
    named = any(phrase.kind == "unknown" and phrase.text[:1].isalpha() for phrase in phrases)
    return named and not kinds & {*WHOLES, "aspect"}


def _is_said_of_it(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether it is said of "it", and the clause before names a thing and no more ("the eyes, make it brighter")."""
    before, linked = _subject(phrases, at)
    if before < 0 or phrases[before].text not in ("it", "它") or not (linked or _caused(phrases, before)):
        return False
    end = _start(phrases, before) - 1
    if end < 1 or phrases[end].kind != "end":
        return False
    named = False
    for phrase in reversed(phrases[max(0, end - REACH) : end]):
        if phrase.kind == "end":
            break
        if phrase.kind not in ("unknown", "determiner", "of", "possessing", "small", "manner"):
            return False
        named |= phrase.kind == "unknown" and phrase.text[:1].isalpha()
    return named


def _can_lie(term: Term) -> bool:
    return term.weak or STAGES[term.name] == "style"


def _lies_on_a_thing(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether "on" and a thing's name follow: "ink on her arm", but not "ink on paper"."""
    place = at + 1
    if place >= len(phrases) or phrases[place].text not in ON:
        return False
    while place + 1 < len(phrases) and phrases[place + 1].kind in ("determiner", "colour", "degree"):
        place += 1
    return place + 1 < len(phrases) and phrases[place + 1].text not in GROUNDS and _is_thing(phrases, place + 1)


def is_bound(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether the colour or degree at this place is meant for a thing that is named beside it."""
    before, linked = _subject(phrases, at)
    if before >= 0 and phrases[before].kind in (*WHOLES, "aspect") and (linked or _caused(phrases, before)):
        return _belongs(phrases, before)
    if phrases[at].text == "sky blue" and at and phrases[at - 1].kind in ("verb", "cause"):
        return not _next_is(phrases, at, "aspect", *WHOLES)  # "turn the sky blue"
    follows = ahead(phrases, at)
    if follows is None and before >= 0 and phrases[before].text in PERSONS and (linked or _caused(phrases, before)):
        return True
    return follows if follows is not None else _behind(phrases, at, before, linked)


def _belongs(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether what is named here only says of which thing, or where: "hair colour", "the eyes in the photo"."""
    if phrases[at].kind == "aspect":
        return at > 0 and phrases[at - 1].kind == "unknown"
    place = at - 1
    while place > 0 and phrases[place].kind == "determiner":
        place -= 1
    return place > 0 and phrases[place].kind in ("of", "to") and phrases[place - 1].kind == "unknown"


def _next_is(phrases: Sequence[Phrase], at: int, *kinds: str) -> bool:
    return at + 1 < len(phrases) and phrases[at + 1].kind in kinds


def ahead(phrases: Sequence[Phrase], at: int) -> bool | None:
    """Whether a thing follows as its noun; False when something else does, None when nothing does."""
    operation, joined = phrases[at].kind == "op", False
    for place in range(at + 1, min(len(phrases), at + REACH)):
        phrase = phrases[place]
        match phrase.kind:
            case "degree" | "possessing":
                joined = True
            case "join" if place + 1 < len(phrases) and phrases[place + 1].bindable:
                pass
            case "determiner" | "of" | "to" if operation:
                joined = True
            case "unknown" | "picture" | "scene" | "aspect" | "manner":
                if operation and phrases[at].chinese and not joined and phrases[at].text not in ACTING:
                    return None  # 明亮清新: one more adjective
                return _is_thing(phrases, place)
            case "op" | "colour":
                if not phrase.bindable:
                    return False
            case _:
                return None
    return None


def _is_thing(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether the nouns that begin here are names of things, with no word for the picture among them."""
    run = []
    for phrase in phrases[at : at + REACH]:
        if phrase.kind not in NOUNS:
            break
        run.append(phrase.kind)
    return "unknown" in run and not {*WHOLES, "aspect"} & set(run)


def _subject(phrases: Sequence[Phrase], at: int) -> tuple[int, bool]:
    """The place of what stands before it (-1: nothing), and whether a linking word is between them."""
    place, linked = at - 1, False
    while place >= max(0, at - REACH):
        phrase = phrases[place]
        if phrase.kind in ("link", "to") or (phrase.kind == "verb" and phrase.text in BECOMING):
            linked = True
        elif phrase.kind == "fill" and phrase.text in COMPARING:
            linked |= phrase.chinese
        elif phrase.kind == "join" and place and phrases[place - 1].bindable:
            place -= 1
        elif phrase.kind not in ("degree", "by", "less", "too"):
            break
        place -= 1
    return place, linked


def _caused(phrases: Sequence[Phrase], at: int) -> bool:
    """Whether a verb stands before the nouns that end here."""
    start = _start(phrases, at, "join")
    return start >= 0 and phrases[start].kind in ("verb", "cause") and phrases[start].text not in BECOMING - {"turn"}


def _start(phrases: Sequence[Phrase], at: int, *more: str) -> int:
    """The place before the nouns that end here, and what belongs to them; `more`: kinds that do, too."""
    place, kinds = at, {*NOUNS, "determiner", "of", "to", "possessing", "small", *more}
    while place >= max(0, at - REACH) and (phrases[place].kind in kinds or phrases[place].bindable):
        place -= 1
    return place


def _behind(phrases: Sequence[Phrase], at: int, before: int, linked: bool) -> bool:
    """Whether a thing stands before it and is made or said to be so."""
    if before < 0 or phrases[before].kind != "unknown":
        return False
    start = _start(phrases, before)
    for place in range(start + 1, before):
        if phrases[place].kind in WHOLES and not (phrases[place].chinese and _next_is(phrases, place, "of")):
            return False  # "make the picture of my cat brighter", but not 照片中的花
    bare = phrases[at].kind == "colour" and not phrases[at].chinese and (start < 0 or phrases[start].kind == "end")
    return linked or bare or _caused(phrases, before)


def things(phrases: Sequence[Phrase], places: frozenset[int]) -> list[str]:
    """The words that have no effect: those that nobody knows, and those at these places. Each once, in order; Chinese
    characters that stand side by side are one word."""
    found: dict[str, None] = {}
    word = ""
    for at, phrase in enumerate(phrases):
        told = at in places or (phrase.kind in ("unknown", "scene", "manner") and phrase.text[:1].isalnum())
        if told and phrase.chinese and phrase.kind == "unknown":
            word += phrase.text
            continue
        if word:
            found.setdefault(word)
            word = ""
        if told:
            found.setdefault(phrase.text)
    if word:
        found.setdefault(word)
    return list(found)
