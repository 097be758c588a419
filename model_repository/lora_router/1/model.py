# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Forwards each request to the engine's model, for the adapter that it names."""

from __future__ import annotations

from .serving.router_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
