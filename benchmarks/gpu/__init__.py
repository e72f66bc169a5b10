"""GPU benchmark of the kernels and the model families."""
