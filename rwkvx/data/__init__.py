"""Text and synthetic data, used by training and by the evaluations."""
