"""From NIfTI files to batches of patches."""
