"""Run these to find something out; nothing imports them. Each is a command, python -m studies.NAME.

  table2       the paper's Table 2 in form, on the built-in task
  figures      the paper's Figures 1 to 5 in form, and the frontier of win rate over KL
  same_tau     do two methods with one equilibrium meet?
  everything   the three above and Figure 6
  gates        what the built-in task, its preference model and the default runs must hold
  bench        what a step costs, phase by phase
  ai_feedback  no command but a file for --preference: a language model asked which is better
runs.py holds what the first three share.
"""
