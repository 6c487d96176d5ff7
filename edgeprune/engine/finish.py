"""Finishes a bundle on its device: `python3 finish.pyz` in the bundle's folder builds, checks, measures, judges."""
