"""What kernels of several families are made with: one file for each tool."""
