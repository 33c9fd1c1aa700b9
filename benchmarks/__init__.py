"""What it costs, beside its peers, in the same run: ratios, because machines are noisy."""
