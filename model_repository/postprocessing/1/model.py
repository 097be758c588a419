# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's tokens to text."""

from __future__ import annotations

from .serving.text_models import Postprocessing as TritonPythonModel

__all__ = ["TritonPythonModel"]
