"""From a checkpoint to images and texts, for commands, notebooks and the trainer's own samples.

Imports data.py and what stands below it; viz, training, metrics and the commands may import it.
"""
