# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM."""

__version__ = "0.1.0"
