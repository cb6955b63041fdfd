"""The encoder-decoder, its branches and their assembly."""
