"""Settings files for known data sets, installed as `tfmtseg.configs`."""
