"""What a run will need, before anything is rented: memory, FLOPs, bytes on the network, and a bound on the step's time.

For a TPU topology the real train step is compiled ahead of time (`compile.py`), on a machine without one; for GPUs, and
without libtpu, the same figures are counted from the configuration alone and marked as an estimate.
"""
