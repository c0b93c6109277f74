"""Labelled images and the files that hold them: folders, tars, tables, and the embedded set. No torch."""
