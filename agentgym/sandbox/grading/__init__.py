"""Verification: what the agent made is graded where the agent has never been."""
