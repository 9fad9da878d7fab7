"""What the serve suite is made of: servers under test, clients, references, and what is read off them."""
