"""Building shards from raw samples: checks, rules, masking, held-out splits, the report."""
