"""Names and security groups in the clouds, from the portal's export.

Read it in this order: document.py (what the portal says), desired.py (which resources that makes), plan.py (what
differs from the last time), standing.py (which time that was), guard.py, gate.py and policy.py (what must never be
applied), steps.py (what cannot be done in one go). None of these knows Pulumi; shapes/ says how each cloud wants it,
clouds/ alone declares it to the engine.
"""
