"""Run these to find something out; nothing imports them. Each is a command, python -m studies.NAME.

  table2       the paper's Table 2 in form, on the built-in task
  figures      the paper's Figures 1 to 5 in form, and the frontier of win rate over KL
  same_tau     do two methods with one equilibrium meet?
  everything   the three above and Figure 6
  equilibrium  is a policy at the equilibrium, and how exploitable is it?
  rungs        does sampled training arrive, where the equilibrium is known?
  middle       does it on small tasks between that one and the built-in one?
  longer       does it on the built-in task, given more steps, more pairs or a lower rate?
  arrival      one table and picture of all these rungs
  capacity     what the built-in task's network can represent, if it is told
  lengths      how long a run must be until the win rate is flat
  paper_scale  the paper's own taus, on length-averaged log-probabilities
  preference   trains a preference model on recorded comparisons, alone
  judge        five splits: is such a model worth more than the responses' lengths?
  gates        what the built-in task, its preference model and the default runs must hold
  rates        which learning rate: its peak, its fall, its warm-up
  survey       every loss once, at its defaults; the best of three taus, three seeds
  lengthening  which losses lengthen, on the task and under a panel that likes length
  exploitability  the six methods' regularised gap: exact where known, a bound on the task
  responder    who can be exploited by what training reaches
  stationary   where each pair loss of losses/ stops; stationary_groups the others
  solvers      later Nash solvers on one cyclic game
  real_model   a pretrained model aligned on real posts; real_model_page draws its page
  cells        what all studies plan, what of it was run, its seconds
  bench        what a step costs, phase by phase
  processes    what several processes gain
  memory       how much memory a step takes
  gpu          all that is to check and to measure on a GPU
  ai_feedback  no command but a file for --preference: a language model asked which is better;
               so are panel_of_texts, likes_length, readers
runs.py holds what those share that are made of runs of the built-in task, tournament.py how their
policies meet.
"""

import stopping  # noqa: F401  first of all: a study takes seconds to import
