"""What an installation offers, whether this node is fit for a run, and whether several are alike and well connected."""
