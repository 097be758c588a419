# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""How many tokens prompt and response may have together, as the config.json of an engine or of a checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path


def length_in(directory: Path) -> int | None:
    """The length in `directory`/config.json; None if it does not say one, or cannot be read.

    Engines of TensorRT-LLM have max_seq_len since 0.11, and before that the lengths of input and output; Hugging Face
    checkpoints have max_position_embeddings.
    """
    try:
        document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        build = document.get("build_config") or document.get("builder_config") or {}
        found = build.get("max_seq_len") or document.get("max_position_embeddings")
        if found is None and "max_input_len" in build and "max_output_len" in build:
            found = build["max_input_len"] + build["max_output_len"]
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None
