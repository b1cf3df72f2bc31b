"""Whose a box is, and what becomes of it when that owner is gone: leases, the reaper, `agentgym sandbox gc`."""
