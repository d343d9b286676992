"""How much text a calibration and a profile take by default; the commands show it in their help."""

CALIBRATION_LENGTH, WINDOWS, STEPS = 512, 64, 500
PROFILE_LENGTH, TEXTS, SINKS, RECENT = 2048, 32, 64, 256
