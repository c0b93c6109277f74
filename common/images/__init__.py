"""Reads labelled images from folders, tars, tables and the embedded data set. Imports no torch."""
