"""Scores: per case for evaluations, per voxel during training."""
