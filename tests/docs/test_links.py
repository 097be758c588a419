# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Links and anchors of README and docs lead somewhere, and every page can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from documentation import DOCS, PAGES, Page


def broken_links(page: Page) -> list[str]:
    """The links of `page` whose file or anchor does not exist. Links to other hosts are not looked at."""
    broken = []
    for link in page.links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.path.parent / file if file else page.path
        if not target.exists() or (anchor and anchor not in Page(target).anchors):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_the_page_leads_somewhere(page: Page) -> None:
    """To a file that exists, and to a heading of it."""
    assert [] == broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A file or a heading that does not exist, not one that does, nor one in code."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One: a `b`\n[a](#one-a-b) [b](#two) [c](page.md#one-a-b) [d](gone.md) [e](https://x.org)\n```\n[f](g)\n```\n"
    )

    assert ["#two", "gone.md"] == broken_links(Page(page))


def test_readme_leads_to_every_page() -> None:
    """Directly: a reader need not guess."""
    readme = PAGES[0]

    assert {f"plugin/docs/{path.name}" for path in DOCS.glob("*.md")} <= {
        link.partition("#")[0] for link in readme.links
    }


def test_headings_of_a_page_have_anchors_of_their_own() -> None:
    """Two that are equal could not both be linked to."""
    assert [] == [page.name for page in PAGES if len(page.anchors) != len(set(page.anchors))]
