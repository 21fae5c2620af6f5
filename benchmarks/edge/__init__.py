"""Large models on small machines, measured: checkpoints of random weights, and what make bench-edge does with them."""
