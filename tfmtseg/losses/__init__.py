"""Losses: of the segmentation, and of the second tasks."""
