"""Defaults of calibrations and profiles, in a file without imports, which keeps `--help` fast."""

CALIBRATION_LENGTH, WINDOWS, STEPS = 512, 64, 500
PROFILE_LENGTH, TEXTS, SINKS, RECENT = 2048, 32, 64, 256
