"""Read and write peel's HDF5 files: trained states, parts of a fit, and finished fits."""
