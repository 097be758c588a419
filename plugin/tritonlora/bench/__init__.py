# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of `tritonlora bench`.

convert, mix, openai and route are the commands. clients, load and mix_clients send requests, each from a process of its
own. scratch makes repositories and starts servers on them; processes and measured are the sizes and the results.
"""
