# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Lists the adapters for clients, and counts requests for Prometheus."""

from __future__ import annotations

from .serving.listing_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
