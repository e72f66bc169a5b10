"""CPU benchmark of the model families at their real shapes."""
