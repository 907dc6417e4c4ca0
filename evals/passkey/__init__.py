"""Passkey retrieval at exact token lengths."""
