# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Convert a PEFT adapter to lora_weights and lora_config, and back."""
