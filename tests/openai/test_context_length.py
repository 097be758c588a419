# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""How long a context is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tritonlora.openai.context_length import length_in


@pytest.mark.parametrize(
    ("document", "length"),
    [
        ({"build_config": {"max_seq_len": 2048, "max_input_len": 1024}}, 2048),
        ({"build_config": {"max_input_len": 1024, "max_output_len": 512}}, 1536),
        ({"builder_config": {"max_input_len": 1000, "max_output_len": 24}}, 1024),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": "512"}, None),
        ({"build_config": []}, None),
        ([], None),
        ({}, None),
    ],
)
def test_engines_and_checkpoints_say_it_in_ways_of_their_own(tmp_path: Path, document: Any, length: int | None) -> None:
    """None, if nothing says it."""
    (tmp_path / "config.json").write_text(json.dumps(document))

    assert length == length_in(tmp_path)
    assert length_in(tmp_path / "nowhere") is None
