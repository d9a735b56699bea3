"""Attention kernels that wait for a GPU to decide between them and the library's; none of them is used to train."""
