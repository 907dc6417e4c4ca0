"""Finished long-context runs, sample by sample."""
