"""Make images and texts with a checkpoint, for commands, notebooks and the trainer's own samples.

This package imports checkpoint.py, viz.grids and the layers below them; viz, training, metrics and
the commands may import this package.
"""
