# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Map the linear layers of Hugging Face architectures to the LoRA modules of TensorRT-LLM."""
