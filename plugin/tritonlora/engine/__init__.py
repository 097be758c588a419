# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine accepts, its LoRA cache to the slot, and whether adapters fit."""
