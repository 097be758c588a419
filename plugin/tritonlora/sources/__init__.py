# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sources of adapters: directories, archives, hubs, buckets and web servers. `fetch.fetched` is the one way in."""
