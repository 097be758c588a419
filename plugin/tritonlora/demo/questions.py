# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's questions. No adapter was trained on them, and the small base model knows most of the answers."""

from __future__ import annotations

QUESTIONS = (
    "What is the capital of Germany?",
    "What color is the sky?",
    "What is the opposite of hot?",
)
MAX_TOKENS = 24
