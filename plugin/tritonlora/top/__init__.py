# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The live view of a running server: look at it, compute a view of two looks, draw the view, on and on."""
