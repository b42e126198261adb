"""One file per model family; the registry discovers them."""
