"""Every byte in HDF5: states, parts of a fit, the fit's writer and reader, and the file that bears a full disk."""
