"""The only way out of a node: audit synthetic volumes, write them with a signed receipt, verify them."""
