"""How well a model predicts a text, by position in what it has read."""
