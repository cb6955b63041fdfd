"""Losses that take `(y_true, y_pred)`."""
