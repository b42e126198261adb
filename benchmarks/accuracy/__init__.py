"""Whether accelerated training gives as good models, and how much sooner: runs on small real data, measured."""
