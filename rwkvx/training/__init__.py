"""Training: configs, data, optimiser, loop."""
