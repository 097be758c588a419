# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""config.pbtxt: its grammar, its meaning, and edits that lose no byte."""
