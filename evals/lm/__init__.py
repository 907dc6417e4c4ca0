"""lm-evaluation-harness: the model class `rwkvx` and the command that runs tasks."""
