"""The worker: holds runs while their playbooks are executed, and sweeps. The rules are in services/.

main.py       claims runs, one thread each, and picks up those of dead workers
execution.py  one run from claim to end
directory.py  the private directory of one run: what lies in it, and that nothing of it stays
executor.py   a program of its own: ansible-runner, under a parent-death signal and a lifeline
sweeper.py    what must happen each second, once a fleet
"""
