"""Figures, printed as ratios that were taken side by side in one run."""
