"""What a run does, from its configuration to its record and pictures. Start with execute.py."""
