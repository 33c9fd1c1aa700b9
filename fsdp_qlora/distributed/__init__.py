"""Who we are: processes, groups, and how they wait for each other."""
