# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find faults that keep the server from loading a repository or make its responses wrong, each with a remedy."""
