"""Where training runs: the catalogue of devices. Standard library and PyYAML only, so a login node can price a job."""

from .hardware import Hardware, HardwareError, hardware, home, known_hardware, match

__all__ = ["Hardware", "HardwareError", "hardware", "home", "known_hardware", "match"]
