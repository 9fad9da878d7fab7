"""What the executor suite is made of: engines in processes of their own, the jobs they are given, and the rows."""
