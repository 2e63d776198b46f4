"""Where training runs: the catalogue of devices, cluster files, jobs, and the engines that run them.

Standard library, PyYAML and pydantic only: a login node can check, price and submit a job in a fraction of a second.
`load_cluster` (load.py) -> `make_job` (job.py) -> `dry_run` or `submit` (launch.py) -> an engine (engine.py, engines/).
On the nodes, a job's script calls `node/attempts.py`, each task leaves a record (`node/ranks.py`), and where no engine
looks after the tasks of a node, `node/heartbeat.py` does.
"""

from .config.document import ClusterError
from .config.hardware import Hardware, HardwareError, hardware, known_hardware, match

__all__ = ["ClusterError", "Hardware", "HardwareError", "hardware", "known_hardware", "match"]
