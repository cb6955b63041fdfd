"""The layouts of data folders, one per file; `tfmtseg.data.folder` tells them apart."""
