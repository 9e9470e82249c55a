"""RemoteGPU's program on each GPU host.

It makes the host match what the portal wants (leases, tasks), reports what is there, and ends leases at their time
without the portal. It imports nothing of the portal; what both share is `agent/protocol/protocol.schema.json`.
"""

__version__ = "0.1.0"
