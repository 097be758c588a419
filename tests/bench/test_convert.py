# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The conversion benchmark measures two ways that do the same, and ours keeps to its memory."""

from __future__ import annotations

from pathlib import Path

from tritonlora.bench.convert import convert, make_adapter, run, straightforward, table


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    """What is compared is the same work, and the simple way is one more oracle of ours."""
    make_adapter(tmp_path, rank=2, layers=1)
    convert(tmp_path, tmp_path / "ours")
    straightforward(tmp_path, tmp_path / "theirs")
    # Ours are sorted by module id; the other has the order of the keys.
    width = 2 * 2 * (4096 + 14336)
    ours, theirs = (
        {content[start : start + width] for start in range(0, len(content), width)}
        for content in ((tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes())
    )

    assert 7 == len(ours)
    assert theirs == ours


def test_peak_memory_is_at_most_the_output_and_one_module(tmp_path: Path) -> None:
    """Resident memory above the imports, the mapped adapter included."""
    (result,) = run(ranks=(16,), rounds=1, layers=8, directory=tmp_path)
    one_module = 16 * (4096 + 14336) * 2

    assert result.convert_peak_nbytes <= result.output_nbytes + one_module
    assert "| 16 | 32 MiB |" in table([result])
