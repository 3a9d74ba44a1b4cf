"""What a run's checkpoints tell about merging them, before any evaluation: how far and how straight they
moved, and how much of that is noise.
"""
