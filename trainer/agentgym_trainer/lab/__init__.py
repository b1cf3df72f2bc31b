"""Laboratories: experiments on one machine that show what a setting does, with the trainer's own code."""
