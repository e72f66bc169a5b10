"""CPU benchmark: this engine and server, and the alternatives, with all-MiniLM-L6-v2."""
