"""Models that the evaluations ask: ours, Hugging Face folders, OpenAI-compatible endpoints."""
