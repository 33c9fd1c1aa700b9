"""How a model comes to be: skeleton on meta, adapters, shards, and the weights streamed into them."""
