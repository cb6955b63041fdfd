"""Whole volumes: sliding window, prediction, evaluation, report."""
