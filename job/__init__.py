"""What keeps a run safe and is not the algorithm: options, folders and checkpoints, kept stages,
reports.

Import it before torch: it sets how torch's threads wait, and what Ctrl-C does until they are there.
"""

import os

import stopping  # noqa: F401  first of all

# Threads that spin while they wait make a run ten times slower when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
