# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: convert.py and route.py for the `tritonlora bench` commands, and what route.py needs."""
