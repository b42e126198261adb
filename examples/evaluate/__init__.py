"""Scores of generated images and clips: what is measured, with which network, and against what."""
