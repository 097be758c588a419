# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""README.md and plugin/docs as data: pages, with their headings, links, code spans and fenced code blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "plugin" / "docs"

_FENCE = re.compile(r"^```(?P<info>.*)\n(?P<text>(?:(?!```).*\n)*)```$", re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced code block: "```bash docker" has the language bash and the mark docker."""

    language: str
    mark: str
    text: str
    line: int  # of its first fence, from 1
    follows: bool  # only blank lines are between it and the block before


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path from the root of the checkout."""
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        """The file without its code blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def blocks(self) -> list[Block]:
        """The code blocks, in order."""
        found, end = [], 0
        for match in _FENCE.finditer(self.text):
            language, _, mark = match["info"].partition(" ")
            line = self.text.count("\n", 0, match.start()) + 1
            found.append(Block(language, mark, match["text"], line, not self.text[end : match.start()].strip()))
            end = match.end()
        return found

    @cached_property
    def anchors(self) -> list[str]:
        """The headings' anchors, as GitHub makes them."""
        headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(self.prose))
        return [heading.strip().replace(" ", "-") for heading in headings]

    @cached_property
    def links(self) -> list[str]:
        """The targets of the links."""
        return _LINK.findall(self.prose)

    @cached_property
    def spans(self) -> list[str]:
        """The code spans, each on one line."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]


PAGES = [Page(path) for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]]
