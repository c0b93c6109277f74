"""Images from a trained model, as files. `launch/sample.py` is the command; start reading there.

classes.py   which classes: the words of `class=` and the label of each image
source.py    which weights: a run folder, an export, its name on the hub, or a released file
request.py   everything that determines the images; a folder of samples keeps it
folder.py    the folder: its batches, and how an interrupted command goes on
files.py     PNG files, the .npz and the grid
work.py      samples the missing batches and finishes the files
"""
