"""What train.py is made of: settings, models, processes, the run's folder, measurements.

Imports viz, inference and what stands below them; only the commands and experiments may import it.
"""
