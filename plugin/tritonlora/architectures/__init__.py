# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which linear layer of which Hugging Face architecture is which LoRA module of TensorRT-LLM."""
