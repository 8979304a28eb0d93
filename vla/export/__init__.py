"""A checkpoint as a folder that runs without torch; scripts/export.py writes it, load.py reads it."""
