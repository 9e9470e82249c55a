"""Looking at the host: files, accounts, processes, mounts, ports, firewall, containers.

Nothing here changes anything, and nothing here knows what a lease is. The baseline is taken with these
readers, and cleaning looks again with them. Removal is in `cleaning/`; `verify.py` has eyes of its own on purpose.
"""
