"""The registered model at work: served, and over a folder of pictures."""
