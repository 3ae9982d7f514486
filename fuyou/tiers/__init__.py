"""Where bytes live: the host arena, the NVMe store with its I/O engines, the device."""
