"""What the tests compare with: random checkpoints, goldens and the scripts that record them."""
