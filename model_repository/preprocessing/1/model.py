# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Text to the engine's tensors."""

from __future__ import annotations

from .serving.text_models import Preprocessing as TritonPythonModel

__all__ = ["TritonPythonModel"]
