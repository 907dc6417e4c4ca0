"""Names that a configuration may give; importing them imports nothing else."""

IMPLEMENTATIONS = ("reference", "torch", "compiled", "triton")
SELECTIONS = ("flat", "coarse_to_fine")
