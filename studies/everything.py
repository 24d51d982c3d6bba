"""Table 2, all figures and the comparison at one tau, as they are in results/.

Run: python -m studies.everything                   (1 h 30 min on 2 cores)
     python -m studies.everything --scale smoke     (3 min 20 s)
"""

import sys

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import bandit
from studies import figures, runs, same_tau, table2


def fig6(study):
    """Figure 6: the paths of the methods in a game of three actions, bandit.py's."""
    bandit.main(["--out", study.results])


PARTS = table2.PARTS | figures.PARTS | dict(fig6=fig6, same_tau=same_tau.same_tau)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.everything", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
