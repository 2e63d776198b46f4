"""Where training runs: the catalogue of devices, cluster files, jobs, and the engines that run them.

Standard library, PyYAML and pydantic only: a login node can check, price and submit a job in a fraction of a second.
`load_cluster` (file.py) -> `make_job` (job.py) -> `dry_run` or `submit` (launch.py) -> an engine (engine.py, engines/).
On the nodes, a job's script calls `attempts.py`, each task leaves a record (ranks.py), and where no engine looks after
the tasks of a node, `lifeline.py` does.
"""

from .hardware import Hardware, HardwareError, hardware, home, known_hardware, match
from .reading import ClusterError

__all__ = ["ClusterError", "Hardware", "HardwareError", "hardware", "home", "known_hardware", "match"]
