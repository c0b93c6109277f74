"""Speed and memory on this machine. Not part of any score."""
