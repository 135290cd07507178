"""The parts of train.py: settings, models, processes, the run's folder, measurements.

Imports viz, inference and what stands below them; only the commands and experiments may import it.
"""
