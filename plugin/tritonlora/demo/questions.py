# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the demo asks: nothing that an adapter was trained on, and little that the small base model gets wrong."""

from __future__ import annotations

QUESTIONS = (
    "What is the capital of Germany?",
    "What color is the sky?",
    "What is the opposite of hot?",
)
MAX_TOKENS = 24
