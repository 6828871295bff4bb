"""The attention kernels, one a module."""
