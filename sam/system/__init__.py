"""How the program runs on its machine: devices, memory, files, what kind a tensor is of."""
