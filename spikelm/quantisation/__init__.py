"""Spikes and int8 weights for a trained model: calibration, search, conversion, report."""
