# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m tritonlora`."""

from tritonlora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
