"""What `pixlat doctor` looks at, one module a topic: packages, gpus, machine, scheduler, and what is measured.

Every check yields findings (finding.py), repairs nothing and leaves nothing behind. A check that could wait for ever
has a time limit. Only launch/doctor.py imports this room.
"""
