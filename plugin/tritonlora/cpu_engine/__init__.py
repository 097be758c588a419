# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The embedded `tensorrt_llm`: a language model on the CPU behind the engine's tensors and LoRA cache."""
