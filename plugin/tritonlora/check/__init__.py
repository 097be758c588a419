# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Findings with remedies: what would keep the server from loading, or make it answer wrongly."""
