# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: base model, adapters, questions, and the flow that puts them together."""
