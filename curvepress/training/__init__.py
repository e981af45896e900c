"""Weights that change by gradients, and statistics of batches read again."""
