# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What our models run inside tritonserver: standard library and numpy only, by relative imports.

`tritonlora init` copies this package whole beside each `model.py` of ours.
"""

__version__ = "0.2.0"
