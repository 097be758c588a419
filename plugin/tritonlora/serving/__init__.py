# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The code that tritonlora's models run inside tritonserver.

It imports numpy and the standard library, and its own modules by relative imports. `tokenizer` imports transformers,
but only when a tokenizer directory is set. `tritonlora init` copies the whole package beside each `model.py` of
tritonlora.
"""

__version__ = "0.2.0"
