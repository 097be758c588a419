# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""docs/python.md does what it says, from the first line to the last, with a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tritonlora
from repositories import synthetic_adapter

PAGE = Path(__file__).parents[2] / "plugin" / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_every_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a reader would type them."""
    for number, name in enumerate(("pirate", "haiku")):
        synthetic_adapter(tmp_path / "adapters" / name, number)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec"), names)  # noqa: S102
    lines = capsys.readouterr().out.splitlines()

    assert [] == names["findings"]
    assert names["plan"].fits
    assert ["haiku"] == [one.name for one in names["removed"]]
    assert {"pirate"} == names["served"].keys()
    assert names["text"]
    assert any("unknown LoRA adapter 'nobody'; available: pirate, prod" in line for line in lines)
    assert any(line.startswith("broken ") for line in lines)
    assert tritonlora.__version__ in lines[-1]
