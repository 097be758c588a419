# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find, start, verify and stop tritonserver; ask it."""
