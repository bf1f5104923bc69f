"""The hga-kvd daemon: owns the K/V of sessions in RAM and on NVMe. Never imports torch."""

__version__ = "0.1.0"
