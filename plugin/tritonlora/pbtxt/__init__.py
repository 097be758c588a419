# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Reads and edits config.pbtxt: its grammar, its meaning, and lossless edits."""
