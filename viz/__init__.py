"""Show results: grids of samples, pages of a sampling run, curves of a training run.

grids.py imports dataset only; the other files import inference too.  training, metrics and the
commands may import viz.
"""
