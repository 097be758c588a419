# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Match the regular expressions of rank_pattern and alpha_pattern with layers' paths, in bounded time.

PEFT's rule (`get_pattern_key` in src/peft/utils/other.py): a pattern matches a path if it matches the whole path, or
everything after one of its dots. Python's `re` tries one way after the other, and a short pattern can have billions of
ways.

Strategy: join all paths into one text. A set of positions in it is an integer with a bit for each position. Each part
of a pattern maps the positions before it to the positions after it, for all paths at once, in a few operations on
integers. The time is at most (length of the pattern) x (length of all paths).

The result says whether a pattern matches, not which characters each group took. A pattern that needs to know the
characters of a group is refused: references to groups, conditions on groups, and possessive repetitions.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from tritonlora.errors import InvalidAdapter

_T = TypeVar("_T")
MAX_LENGTH = 1000  # characters of a pattern
MAX_DEPTH = 50  # groups within groups
_MAX_PAIRS = 4096 * 4096  # patterns times paths: a model has fewer than 4096 linear layers, each with a pattern
_MAX_WORK = 100_000_000_000  # cost of the patterns times characters of the paths: takes seconds


@dataclass(frozen=True, slots=True)
class _Characters:
    """From `least` to `most` characters that match `atom`, a regular expression for one character."""

    atom: str
    least: int = 1
    most: float = 1


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A condition on a place, which takes no character: "^", "$", or one written with a backslash."""

    name: str


@dataclass(frozen=True, slots=True)
class _Choice:
    """A choice between several sequences."""

    options: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True, slots=True)
class _Look:
    """A lookahead, or with `before` a lookbehind: `inner` matches at this place, or with `negated` does not."""

    inner: _Choice
    before: bool
    negated: bool


_Node: TypeAlias = "_Characters | _Anchor | _Choice | _Look"

_TOKEN = re.compile(
    r"""
    (?P<comment>  \(\?\#[^)]*\) )
  | (?P<look>     \(\?<?[=!] )
  | (?P<open>     \((?:\?:|(?!\?)) )
  | (?P<close>    \) )
  | (?P<bar>      \| )
  | (?P<anchor>   \^ | \$ | \\[AZzbB] )
  | (?P<repeat>   (?: [*+?] | \{(?!\})(?P<least>[0-9]*)(?P<comma>,(?P<most>[0-9]*))?\} ) (?P<how>[?+]?) )
  | (?P<atom>     \\(?: x[0-9a-fA-F]{2} | u[0-9a-fA-F]{4} | U[0-9a-fA-F]{8} | N\{[^}]*\} | 0[0-7]{0,2} | [0-3][0-7]{2}
                      | [^0-9] )
                | \[\^?\]?(?:\\.|[^\]\\])*\]
                | [^\\()\[] )
    """,
    re.VERBOSE | re.DOTALL,
)
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]")


@functools.lru_cache(maxsize=16384)
def parse(pattern: str) -> _Choice:
    """The syntax tree of `pattern`; ValueError with the reason if it is malformed or not supported."""
    if len(pattern) > MAX_LENGTH or _REPEATED_GROUP.search(pattern) or _FLAGS.search(pattern):
        raise ValueError("a repeated group, flags, or too long; write the layers' names")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a FutureWarning about nested sets
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = error.msg if isinstance(error, re.error) else error
        raise ValueError(f"not a regular expression ({reason})") from None
    return _parsed(pattern)


def _parsed(pattern: str) -> _Choice:
    """The syntax tree of `pattern`, which Python's `re` has compiled. Raises ValueError if it is not supported."""
    groups: list[list[list[_Node]]] = [[[]]]  # the open groups, each with its options so far
    looks: list[str] = []  # the opening token of each open group
    position = 0
    while position < len(pattern):
        match = _TOKEN.match(pattern, position)
        if match is None or match["how"] == "+":
            raise ValueError(
                "a reference, a condition, or a repetition that gives nothing back; write the layers' names"
            )
        position, kind, options = match.end(), match.lastgroup, groups[-1]
        if kind in ("open", "look"):
            if len(groups) > MAX_DEPTH:
                raise ValueError(f"groups that are nested more than {MAX_DEPTH} deep; write the layers' names")
            groups.append([[]])
            looks.append(match[0])
        elif kind == "close":
            inner, look = _Choice(tuple(map(tuple, groups.pop()))), looks.pop()
            is_look = look[-1] in "=!"
            groups[-1][-1].append(_Look(inner, "<" in look, look[-1] == "!") if is_look else inner)
        elif kind == "bar":
            options.append([])
        elif kind == "anchor":
            options[-1].append(_Anchor(match[0]))
        elif kind == "atom":
            options[-1].append(_Characters(match[0]))
        elif kind != "comment":
            options[-1].append(_repeated(options[-1].pop(), match))
    return _Choice(tuple(map(tuple, groups[0])))


def _repeated(node: _Node, match: re.Match[str]) -> _Node:
    if not isinstance(node, _Characters):  # a group with `?`; `parse` refuses other repeated groups
        return _Choice(((), (node,)))
    if match["least"] is None:
        least, most = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[match[0][0]]
    else:
        least = int(match["least"] or 0)
        most = least if match["comma"] is None else int(match["most"]) if match["most"] else math.inf
    return _Characters(node.atom, least, most)


class Paths:
    """The paths of layers, prepared to be matched with many patterns."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Prepare the `paths`, which are ASCII and have no line breaks."""
        self._paths = paths
        self._longest = max(map(len, paths), default=0)
        self._row = "".join(f"{path}\n" for path in paths).encode("ascii")  # a line break ends each path
        self._masks: dict[str, int] = {}  # atom -> the places of the characters that it matches
        self._letters: dict[int, int] = {}  # character -> its places
        ends = self._places_of(ord("\n"))
        self._all = (1 << len(self._row)) - 1
        starts = (ends << 1 | 1) & self._all
        words = self._mask(r"\w")
        boundaries = words ^ words << 1
        self._beginnings = starts | self._mask(r"\.") << 1  # the places where a match may begin by PEFT's rule
        self._anchors = {
            **dict.fromkeys(("^", r"\A"), starts),
            **dict.fromkeys(("$", r"\Z", r"\z"), ends),
            r"\b": boundaries,
            r"\B": self._all & ~boundaries,
        }

    def matched_by(self, pattern: str) -> list[int]:
        """The indices of the paths that match `pattern`. Raises ValueError if `parse` refuses the pattern."""
        found = self._through(parse(pattern), self._beginnings, backwards=False) & self._anchors["$"]
        if not found:
            return []
        return [self._number_at[match.start()] for match in re.finditer("1", f"{found:b}"[::-1])]

    def cost(self, pattern: str) -> int:
        """The number of operations on all places that `matched_by` takes for `pattern`."""
        return self._cost(parse(pattern))

    @functools.cached_property
    def _number_at(self) -> dict[int, int]:
        places = itertools.accumulate(len(path) + 1 for path in self._paths)
        return {place - 1: number for number, place in enumerate(places)}

    def _through(self, node: _Node, places: int, *, backwards: bool) -> int:
        """The places after `node` if it starts at one of `places`; `backwards`: before `node` if it ends at one."""
        if isinstance(node, _Anchor):
            return places & self._anchors[node.name]
        if isinstance(node, _Look):
            # Each place is decided on its own: `seen` are all places at which `inner` matches.
            seen = self._through(node.inner, self._all, backwards=not node.before)
            return places & (~seen if node.negated else seen)
        if isinstance(node, _Choice):
            return functools.reduce(operator.or_, (self._along(one, places, backwards) for one in node.options))
        mask = self._mask(node.atom)
        for _ in range(min(node.least, self._longest + 1)):
            places = _step(places, mask, backwards)
        if node.most - node.least >= self._longest:
            return self._run(places, mask, backwards)
        reached = places
        for _ in range(int(node.most - node.least)):
            places = _step(places, mask, backwards)
            reached |= places
        return reached

    def _along(self, sequence: Sequence[_Node], places: int, backwards: bool) -> int:
        for node in reversed(sequence) if backwards else sequence:
            places = self._through(node, places, backwards=backwards)
        return places

    def _run(self, places: int, mask: int, backwards: bool) -> int:
        """The places that any number of steps reaches, found with steps of 1, 2, 4, … characters."""
        length = 1
        way = mask if backwards else mask << 1  # the places that a run may reach
        while length <= self._longest:
            places |= (places >> length if backwards else places << length) & way
            way &= way >> length if backwards else way << length
            length *= 2
        return places

    def _cost(self, node: _Node) -> int:
        if isinstance(node, _Anchor):
            return 1
        if isinstance(node, _Look):
            return 1 + self._cost(node.inner)
        if isinstance(node, _Choice):
            return sum(1 + sum(map(self._cost, option)) for option in node.options)
        extra = node.most - node.least
        runs = 6 * self._longest.bit_length() if extra >= self._longest else 3 * int(extra)
        return 2 * min(node.least, self._longest + 1) + runs

    def _mask(self, atom: str) -> int:
        """The places of the characters that `atom` matches."""
        if atom not in self._masks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                matches = re.compile(atom).fullmatch
            letters = (letter for letter in {*self._row} - {ord("\n")} if matches(chr(letter)))
            self._masks[atom] = functools.reduce(operator.or_, map(self._places_of, letters), 0)
        return self._masks[atom]

    def _places_of(self, letter: int) -> int:
        if letter not in self._letters:
            digits = bytes(ord("1") if one == letter else ord("0") for one in range(256))
            self._letters[letter] = int(self._row[::-1].translate(digits), 2) if self._row else 0
        return self._letters[letter]


def _step(places: int, mask: int, backwards: bool) -> int:
    return places >> 1 & mask if backwards else (places & mask) << 1


def matches(patterns: Mapping[str, _T], paths: Sequence[str]) -> dict[str, list[_T]]:
    """Path -> the values of all patterns that match it, in the patterns' order; without paths that match none.

    Raises InvalidAdapter if matching so many patterns and paths would take more than seconds.
    """
    found: dict[str, list[_T]] = {}
    if not patterns or not paths:
        return found
    row = Paths(paths)
    work = sum(map(row.cost, patterns)) * sum(map(len, paths))
    if len(patterns) * len(paths) > _MAX_PAIRS or work > _MAX_WORK:
        raise InvalidAdapter(
            f"{len(patterns)} patterns for {len(paths)} layers are more than any model needs; write fewer, or shorter "
            "ones"
        )
    for pattern, value in patterns.items():
        for number in row.matched_by(pattern):
            found.setdefault(paths[number], []).append(value)
    return found
