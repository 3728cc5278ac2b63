"""References of the tests: random checkpoints, goldens and the scripts that record them."""
