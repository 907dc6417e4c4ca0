"""Training and evaluation configurations (YAML), found by name through importlib.resources."""
