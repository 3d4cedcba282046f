"""One attention processor for every block, and the fastest kernel that this GPU can run."""
