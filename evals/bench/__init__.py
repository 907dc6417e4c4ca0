"""Speed and memory on this machine: ours, the floor of its matrix products, and peers."""
