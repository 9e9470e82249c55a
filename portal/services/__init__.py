"""The rules: one module per noun, told in the order of its life. Every write of the portal goes through here.

No HTTP, no HTML, no process and no host: callers pass who and why; slow work is done by `worker/` and `integrations/`
outside any transaction.
"""
