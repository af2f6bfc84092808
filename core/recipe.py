"""Reads a prompt (English or Chinese) into a recipe of image operations. No network: a lexicon and a small grammar.

The longest phrase known wins at each place. Degree words ("slightly", "very", "50%", 稍微, 一点) set the strength of
the operation they stand at; "less", a minus and a complaint ("too dark") turn it into its opposite; a negation holds
to the end of its clause; "not too bright" bounds what was asked elsewhere. Operations come out in the order in which
they are applied, which is that of `core.vocabulary`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from core import objects, scenery
from core.errors import InvalidParameter
from core.objects import Phrase, phrase
from core.vocabulary import ASIDE, LEXICON, LONGEST, OPPOSITES, STAGES, Term, base, examples, tokens

STRONGEST = 2.0
FAINTEST = 0.05
NOT_TOO = 0.5
TURNS = ("mirror", "flip")
BESIDE_A_MOOD = 0.5
MOST_IGNORED, MOST_LETTERS = 32, 32  # words that are told to have no effect, and letters of each
_CLAUSE_ENDS = frozenset(".,;:!?。\n")
_UNKNOWN = Term("unknown")


@dataclass(frozen=True, slots=True)
class Operation:
    """One image operation. `params` holds `strength` (0.05-2.0, 1.0 unless the prompt says otherwise) and, for `tint`,
    `colours`: names of `core.vocabulary.COLOURS` in the prompt's order."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain data for a client: {"operation": "sunset", "strength": 1.0}."""
        return {"operation": self.name, **self.params}


def read_recipe(prompt: str, negative: str = "") -> tuple[Operation, ...]:
    """The operations a prompt asks for, in the order in which they apply; those named in `negative` are left out.

    Raises `InvalidParameter` when no operation is understood in the prompt itself, with the list of what is."""
    wanted = _Reader(prompt)
    if not wanted.strengths:
        if wanted.things:
            raise InvalidParameter(
                f"this model changes the whole picture and finds no single thing in it, so it cannot do "
                f"'{wanted.things[0][:MOST_LETTERS]}' for a part ({', '.join(wanted.ignored[:8])}); try one or several "
                f"of: {examples()}, or a model that draws",
                parameter="prompt", ignored=wanted.ignored,
            )
        if wanted.banned | wanted.waved:
            raise InvalidParameter("the prompt only says what not to do; name an edit to make", parameter="prompt")
        raise InvalidParameter(
            f"nothing in the prompt is an edit that is understood; try one or several of: {examples()}",
            parameter="prompt",
        )
    return wanted.operations(without=named(negative))


def read_prompt(prompt: str, negative: str = "") -> tuple[tuple[Operation, ...], list[str]]:
    """As `find_operations`, and the prompt's words that have no effect, each once, in their order: those that nobody
    knows, and the colours and degrees of things that cannot be found."""
    reader = _Reader(prompt)
    return reader.operations(without=named(negative)), reader.ignored


def find_operations(prompt: str, negative: str = "") -> tuple[Operation, ...]:
    """As `read_recipe`, but a prompt without any known word is simply no operation."""
    return _Reader(prompt).operations(without=named(negative))


def named(text: str) -> frozenset[str]:
    """Every operation and colour a text names, wanted or negated: what a negative prompt takes out."""
    reader = _Reader(text)
    return frozenset(reader.strengths) | reader.banned | reader.waved | reader.caps


class _Reader:
    """One pass over the prompt. Colours are kept beside operations, as `#purple`."""

    def __init__(self, text: str) -> None:
        self.strengths: dict[str, float] = {}
        self.weak: set[str] = set()
        self.banned: set[str] = set()
        self.waved: set[str] = set()  # banned by a weak word: "night without stars" is still night
        self.caps: set[str] = set()
        phrases = _phrases(unicodedata.normalize("NFKC", text))
        places = scenery.bound(phrases)
        self.things = [phrases[at].text for at in sorted(places)]
        self.ignored = [word[:MOST_LETTERS] for word in objects.things(phrases, places)[:MOST_IGNORED]]
        self._read([_UNKNOWN if at in places else each.term for at, each in enumerate(phrases)])
        for name in self.banned | (self.waved & self.weak):
            self.strengths.pop(name, None)
        self._drop_weak()

    def operations(self, without: frozenset[str]) -> tuple[Operation, ...]:
        kept = {name: self._strength(name) for name in self.strengths if name not in without}
        colours = [name[1:] for name in kept if name.startswith("#")]
        recipe = {name: {"strength": kept[name]} for name in kept if name in STAGES}
        if colours and "tint" not in without:
            share = BESIDE_A_MOOD if any(STAGES.get(name) == "mood" for name in kept) else 1.0
            strength = max(kept[f"#{name}"] for name in colours) * share
            recipe["tint"] = {"strength": strength, "colours": colours}  # type: ignore[dict-item]
        return tuple(Operation(name, dict(recipe[name])) for name in STAGES if name in recipe)

    def _strength(self, name: str) -> float:
        strength = min(STRONGEST, max(FAINTEST, self.strengths[name]))
        return min(strength, NOT_TOO) if name in self.caps else strength

    def _read(self, phrases: list[Term]) -> None:
        degree = 1.0
        negated = capped = less = False
        last: str | None = None  # the operation a following "by 20%" or 一点 belongs to
        after = False  # "by" was read: the degree that comes belongs to `last`
        turned, said = "", False  # the flip or mirror of this clause, and whether it was said which way
        for term, then in pairwise([*phrases, _UNKNOWN]):
            match term.kind:
                case "op" | "colour":
                    name = term.name if term.kind == "op" else f"#{term.name}"
                    name = OPPOSITES.get(name, "") if less else name
                    last = self._note(name, degree, term.weak, negated or (less and not name), capped) if name else None
                    turned, said = name if name in TURNS else "", False
                    if then.kind != "join":
                        degree = 1.0
                    less = capped = after = False
                    continue
                case "degree" if term.value < 0 and last and (after or then.kind not in ("op", "colour")):
                    self._reverse(last, -term.value)
                case "degree" if term.value < 0:
                    degree, less = -term.value, True
                    continue
                case "degree":
                    if last and (after or term.trails or then.kind not in ("op", "colour")):
                        self.strengths[last] = term.value
                    else:
                        degree = term.value
                case "by":
                    after = True
                    continue
                case "not":
                    negated = True
                case "cap":
                    capped = True
                case "less":
                    less = True
                case "too" if then.kind in ("op", "degree"):
                    less = True
                case "way" if turned in self.strengths:
                    self.strengths[term.name] = self.strengths[turned] if said else self.strengths.pop(turned)
                    turned, said = term.name, True
                case "stop" | "end":
                    negated = capped = less = False
                    degree, turned = 1.0, ""
                case "join" if then.kind in ("verb", "by"):
                    negated = less = False
                case "join" | "fill":
                    continue
            last, after = None, False

    def _note(self, name: str, degree: float, weak: bool, negated: bool, capped: bool) -> str | None:
        if capped:
            self.caps.add(name)
            return None
        if negated:
            (self.waved if weak else self.banned).add(name)
            return None
        before = self.strengths.get(name, 0.0)
        self.strengths[name] = max(before, degree)
        if weak and (not before or name in self.weak):
            self.weak.add(name)
        else:
            self.weak.discard(name)
        return name

    def _reverse(self, name: str, degree: float) -> None:
        """What was asked for by less than nothing is its opposite, where it has one."""
        self.strengths.pop(name, None)
        if opposite := OPPOSITES.get(name):
            self.strengths[opposite] = max(self.strengths.get(opposite, 0.0), degree)

    def _drop_weak(self) -> None:
        strong = {STAGES[name] for name in self.strengths if name in STAGES and name not in self.weak}
        weak = [name for name in self.strengths if name in self.weak]
        for name in weak:
            if STAGES[name] in strong or (name != weak[0] and STAGES[name] == STAGES[weak[0]]):
                del self.strengths[name]


def _phrases(text: str) -> list[Phrase]:
    """The text as phrases: at each place the longest one of the lexicon, else one that means no operation, a number, a
    clause end, or a word that nobody knows."""
    words = tokens(text)
    bases = [word if word >= "㐀" else base(word) for word in words]
    found: list[Phrase] = []
    at = 0
    while at < len(words):
        longest = max(LONGEST.get(words[at], 0), LONGEST.get(bases[at], 0))
        for size in range(min(longest, len(words) - at), 0, -1):
            some = tuple(words[at : at + size])
            term = LEXICON.get(some) or (None if some[0] >= "㐀" else LEXICON.get(tuple(bases[at : at + size])))
            if term is not None:
                found.append(phrase(term, _joined(some)))
                at += size
                break
        else:
            size, term = _aside(words, at)
            found.append(phrase(term, _joined(words[at : at + size])))
            at += size
    return found


def _aside(words: list[str], at: int) -> tuple[int, Term]:
    """How many words from here are one that means no operation, and what it is."""
    for size in (2, 1):
        some = words[at : at + size]
        term = ASIDE.get(tuple(some)) or ASIDE.get((*some[:-1], some[-1].removesuffix("'s").removesuffix("s")))
        if term is not None and len(some) == size:
            return size, term
    return 1, _other(words[at])


def _joined(words: Sequence[str]) -> str:
    return ("" if words[0] >= "㐀" else " ").join(words)


def _other(word: str) -> Term:
    if word.endswith("%") and word != "%":
        return Term("degree", value=float(word[:-1]) / 100)
    if word in _CLAUSE_ENDS:
        return Term("end")
    return _UNKNOWN
