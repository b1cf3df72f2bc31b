"""Boxes that are ready before somebody asks."""
