"""What a step and a model state cost, from the configuration alone: FLOPs, bytes, and the figures of known chips."""
