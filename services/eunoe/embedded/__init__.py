"""The whole platform on one machine: the same processes as on a cluster, small, on loopback only.

`Platform` starts and stops them; `eunoe up|down|status` is its command line. The files of one platform lie in its home
directory (EUNOE_HOME, default ~/.eunoe): what runs (platform.json), logs, and Redis's data, which stay when it stops.
"""
