"""What faults, overload and restarts cost; `kelp.chaos` does them."""
