"""Long-context tasks of exact token lengths, for any model."""
