"""The parts of train.py: settings, models, processes, the run's folder, measurements.

This package imports viz, inference and the layers below them; only the commands and experiments may
import this package.
"""
