# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sources of adapters: directories, archives, hubs, buckets and web servers.

`fetch.fetched` is the one way in. It takes `location.Location` apart by scheme: `hub` asks huggingface_hub, which has a
cache of its own. `web` and `bucket` are stores of files, which `download` brings into our cache. `archive` unpacks.
"""
