"""The machine under the program: devices, how much they take at a time, memory, files, kinds of tensors."""
