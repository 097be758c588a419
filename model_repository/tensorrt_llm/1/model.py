# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine, in the place of a TensorRT-LLM engine."""

from __future__ import annotations

from tritonlora.cpu_engine.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
