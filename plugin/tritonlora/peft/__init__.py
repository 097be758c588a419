# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read a PEFT adapter's directory, and refuse every field and tensor that is not understood."""
