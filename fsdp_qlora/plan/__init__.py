"""What will happen: which linears become 4-bit, how they are cut into rows, how a batch splits, what it all weighs."""
