# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sources of adapters: directories, archives, hubs, buckets and web servers.

`fetch.fetched` is the one way in. `location` reads a source, and `policy` says whether it is allowed. `transports`
fetches: `hub` by huggingface_hub, which has a cache of its own, and the files of `web` and `bucket` by `download`, into
our cache. `archive` unpacks.
"""
