"""Starting runs: the one command, and the job that it starts."""
