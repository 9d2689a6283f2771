"""Stage one: autoencoders, their bottlenecks, losses and training."""
