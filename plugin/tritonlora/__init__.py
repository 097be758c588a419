# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM."""

from tritonlora.serving import __version__

__all__ = ["__version__"]
