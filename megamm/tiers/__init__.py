"""Where checkpoints live besides RUN/checkpoints, and which of them stays.

    local      parts on the nodes' own RAM disks, and replicas on a peer (local.py, parts.py, peer.py, wire.py)
    durable    any fsspec URL: finished folders are copied there by a process of its own (uploader.py, durable.py)
    retention  which checkpoints may go; the pointers `latest` and `best`
    choose     the newest valid checkpoint over both, for a resuming run

Nothing but choose.py and local.py imports torch: the processes beside the run start at once.
"""
