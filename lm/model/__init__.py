"""The transformer, and the device it computes on."""
