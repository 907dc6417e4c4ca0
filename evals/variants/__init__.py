"""Architectures of equal size, trained alike on the same text and compared."""
