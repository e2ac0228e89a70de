"""Storage tiers of checkpoints besides RUN/checkpoints, and their retention.

    local      parts on the nodes' own RAM disks, and replicas on a peer (local.py, parts.py, peer.py, wire.py)
    durable    any fsspec URL; a separate process copies finished folders there (uploader.py, durable.py)
    retention  which checkpoints to remove; the pointers `latest` and `best`
    choose     the newest valid checkpoint over all tiers, for a resuming run

Only choose.py and local.py import torch, so that the helper processes start at once.
"""
