"""Kernels on a GPU, beside what the machine can do at most and beside other packages."""
