"""A whole site from nothing by `playbooks/site.yml`, and what its monitoring says when a plug is pulled.

site.py makes it and says which of its parts stand in for others; disk.py gives a host a disk that can be filled;
faults.py says of each fault how it is pulled, what has to be seen, and how it is mended; test_site.py tells the story.
Rules and their real times are tested by promtool (tests/roles/rules); here one variable makes all of them shorter.
"""
