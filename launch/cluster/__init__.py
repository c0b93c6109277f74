"""Runs as jobs: of Slurm, or of several processes on this machine, both through submitit."""
