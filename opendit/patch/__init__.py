"""How a model is recognised, planned for, edited in place and given back."""
