"""Make images and texts with a checkpoint, for commands, notebooks and the trainer's own samples.

This package imports data.py and the layers below it; viz, training, metrics and the commands may
import this package.
"""
