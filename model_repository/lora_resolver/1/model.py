# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Says which lora_task_id a request names, as a step of an ensemble."""

from __future__ import annotations

from .serving.resolver_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
