# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: one module for each `tritonlora bench` command."""
