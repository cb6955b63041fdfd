"""The command-line scripts, installed as `tfmtseg.tools`."""
