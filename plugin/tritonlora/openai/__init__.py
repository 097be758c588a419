# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible door: an HTTP server before a running Triton, which it asks over gRPC."""
