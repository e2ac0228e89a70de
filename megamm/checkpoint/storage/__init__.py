"""Storage of checkpoints besides RUN/checkpoints.

    local      parts on the nodes' own RAM disks, replicas on a peer (local.py, local_files.py, peer.py)
    remote     any fsspec URL; a separate process copies finished folders there (remote.py, uploader.py)
    choose.py  the newest valid checkpoint in any of them, for a resuming run

Only choose.py and local.py import torch, so that the helper processes start at once.
"""
