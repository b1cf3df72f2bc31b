"""What a person sees of a run: progress, tables, plots. Pure functions of figures; must never know the trainer."""
