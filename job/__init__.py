"""What keeps a run safe and is not the algorithm: options, folders and checkpoints, kept stages,
reports.

Import it before torch: it sets how torch's threads wait.
"""

import os

# Threads that spin while they wait make a run ten times slower when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
