"""What the sim suite is made of: cases, simulations in two processes, the rows and the cost of scale."""
